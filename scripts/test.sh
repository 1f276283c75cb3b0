#!/usr/bin/env bash
# Lint, types and tests, as continuous integration runs them. Arguments go to pytest:
#   bash scripts/test.sh -x -k accept
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev

# The tokenizers library warns about its threads wherever a test forks a process.
export TOKENIZERS_PARALLELISM=false
ruff check
ruff format --check
# Types beside the tests, which leave cores idle at their start and end; what is wrong with them is told last.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy runtime train >"$types" 2>&1 &
# Two at a time: tests run on one thread each, and a file stays in one process; long files first (tests/conftest.py).
failed=0
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait $! || failed=1
cat "$types"
exit "$failed"
