#!/usr/bin/env bash
# The second tier: complete matrices, stress and fault counts. Takes hours; may be interrupted and started again.
#
#   bash tests/full.sh [PYTEST_ARGUMENT...]
#
# Tests that have passed on the present sources are not run again. What has been run so far is in tests/results.md, with
# date and commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
prepare_environment dev
source tests/settings.sh
exec python -m pytest -p tests.helpers.full_tier -m full --timeout 7200 tests "$@"
