#!/usr/bin/env bash
# The first tier, what CI runs: style, types, then all tests but the full tier. About 30 minutes on 2 cores.
#
#   bash tests/run.sh
#
# Every step runs even when an earlier one has failed; the exit code is 0 only when all have passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
prepare_environment dev
source tests/settings.sh

summary=()
num_passed=0
num_failed=0

run_step() { # NAME COMMAND...
    local name="$1" start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    if "$@"; then
        num_passed=$((num_passed + 1))
        summary+=("$(printf '%-8s ok      %4d s' "$name" $((SECONDS - start)))")
    else
        num_failed=$((num_failed + 1))
        summary+=("$(printf '%-8s FAILED  %4d s' "$name" $((SECONDS - start)))")
    fi
}

run_step lint python -m ruff check .
run_step format python -m ruff format --check .
run_step types python -m mypy
# Tests of one process share the cores; those that start processes of their own have them to themselves.
run_step tests python -m pytest --quiet --numprocesses 2 --dist loadfile --durations 5 tests/guards tests/unit tests/contract
run_step layouts python -m pytest --quiet --durations 10 tests/parity tests/distributed
run_step learning python -m pytest --quiet tests/learning

printf '\n%s\n' "== summary" "${summary[@]}"
printf '\nchecks: %d passed, %d failed\n' "$num_passed" "$num_failed"
[ "$num_failed" -eq 0 ]
