# Sourced by examples/quickstart.sh, tests/run.sh and tests/full.sh.
#
#   prepare_environment EXTRA...
#
# leaves in $PYTHON an interpreter that has torch, this package and the named extras of setup.py, its scripts first on
# PATH and this checkout first on PYTHONPATH:
#   - the active Python when it has torch (a virtual environment, conda, an NGC container): what is missing is added with
#     pip, torch and everything else stay as they are;
#   - otherwise .venv in this checkout, made on the first run with the versions of examples/constraints.txt.
# A second run only checks, in under a second.
#
# Honoured: PYTHON (interpreter to start from), PIP_INDEX_URL and all other settings of pip, TORCH_INDEX_URL (index for
# torch alone).

TORCH_VERSION='from importlib.metadata import version; print(version("torch"))'
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '[environment] %s\n' "$*"; }

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

is_supported() { # PYTHON: 3.10, 3.11 or 3.12
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

has_torch() { # PYTHON: torch is installed (not imported: that takes seconds)
    "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null
}

active_python_with_torch() {
    local candidate
    for candidate in ${PYTHON:-python python3}; do
        if is_supported "$candidate" && has_torch "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

supported_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python python3.12 python3.11 python3.10}; do
        if is_supported "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

pip_install() { # pip without chatter where nobody watches
    local quiet=()
    [ -t 1 ] || quiet=(--quiet)
    "$PYTHON" -m pip install --disable-pip-version-check "${quiet[@]}" "$@"
}

make_venv() {
    local base
    base="$(supported_python)"
    [ -n "$base" ] || fail "no Python 3.10, 3.11 or 3.12 found: install one, or name it: PYTHON=/path/to/python bash $0"
    say "no active Python has torch: making .venv with $("$base" --version)"
    "$base" -m venv --clear "$ROOT/.venv" || fail "'$base -m venv' failed: on Debian and Ubuntu install python3-venv"
}

install_torch() {
    local index=()
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        index=(--index-url "$TORCH_INDEX_URL")
        say "installing torch from TORCH_INDEX_URL"
    elif [ "$(uname -s)" = Linux ]; then
        say "installing torch. On a plain package index torch for Linux is the CUDA build, a download of several GB."
        say "For the CPU build (200 MB) stop now and set TORCH_INDEX_URL to PyTorch's CPU index, which the install"
        say "selector on pytorch.org shows (Linux, Pip, Python, CPU); or activate an environment that has torch."
    fi
    pip_install "${index[@]}" --constraint "$ROOT/examples/constraints.txt" torch \
        || fail "torch could not be installed: see pip's message above; an environment with torch >= 2.6 does as well"
}

install_missing() { # CONSTRAINTS EXTRA...
    local constraints="$1" missing
    shift
    # The check itself reads setup.py, which imports setuptools.
    "$PYTHON" -c 'import packaging.requirements, setuptools' 2>/dev/null || pip_install packaging setuptools
    missing="$("$PYTHON" "$ROOT/examples/missing_requirements.py" "$@")" || fail "cannot check what is installed in $PYTHON"
    [ -n "$missing" ] || return 0
    ! grep -q '^torch' <<<"$missing" \
        || fail "torch $("$PYTHON" -c "$TORCH_VERSION") in $PYTHON is older than 2.6: update it, or deactivate that environment"
    local requirements=()
    mapfile -t requirements < <(grep -vx megatron_metro <<<"$missing")
    if [ "${#requirements[@]}" -gt 0 ]; then
        say "installing: ${requirements[*]}"
        pip_install --constraint "$constraints" "${requirements[@]}" || fail "see pip's message above"
    fi
    if grep -qx megatron_metro <<<"$missing"; then
        say "installing this checkout (editable)"
        pip_install --no-deps --use-pep517 --editable "$ROOT" || fail "see pip's message above"
    fi
}

prepare_environment() { # EXTRA...
    local constraints active torch_version torch_after
    constraints="$(mktemp)"
    active="$(active_python_with_torch)"
    if [ -n "$active" ]; then
        PYTHON="$active"
        say "using $PYTHON, which has torch"
    else
        is_supported "$ROOT/.venv/bin/python" || make_venv
        PYTHON="$ROOT/.venv/bin/python"
        has_torch "$PYTHON" || install_torch
        say "using .venv"
        grep -v '^torch==' "$ROOT/examples/constraints.txt" >"$constraints"
    fi
    torch_version="$("$PYTHON" -c "$TORCH_VERSION")" || fail "torch in $PYTHON has no metadata: reinstall it"
    echo "torch==$torch_version" >>"$constraints"
    install_missing "$constraints" "$@"
    rm -f "$constraints"
    torch_after="$("$PYTHON" -c "$TORCH_VERSION")"
    [ "$torch_after" = "$torch_version" ] || fail "installing replaced torch $torch_version by $torch_after"
    # This checkout comes before another one that the environment may have installed.
    export PYTHON PATH="$(dirname "$PYTHON"):$PATH" PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}
