#!/usr/bin/env bash
# Lint, types and tests, as continuous integration runs them. Arguments go to pytest:
#   bash scripts/test.sh -x -k accept
# With --newest first, only pytest, in an environment of its own with the newest torch, transformers (below 5.25) and all else:
#   bash scripts/test.sh --newest tests/runtime     # $SPECBOUND_VENV keeps it in a folder, for a second run
# With --oldest, in one with the oldest transformers that pyproject.toml allows, the usual torch, and what goes with them.
set -euo pipefail
cd "$(dirname "$0")/.."
other=
if [ "${1:-}" = --newest ] || [ "${1:-}" = --oldest ]; then
    other=$1
    shift
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    export SPECBOUND_VENV=${SPECBOUND_VENV:-$scratch/venv} SPECBOUND_CONSTRAINTS=/dev/null
    if [ "$other" = --oldest ]; then
        SPECBOUND_CONSTRAINTS=$scratch/constraints.txt
        sed -nE 's/^ +"(transformers)>=([0-9.]+).*/\1==\2/p' pyproject.toml >"$SPECBOUND_CONSTRAINTS"
        grep '^torch==' constraints.txt >>"$SPECBOUND_CONSTRAINTS"
    fi
fi
source scripts/setup.sh dev

# Dozens of processes import the same modules: what the first compiles is kept for the others.
export PYTHONDONTWRITEBYTECODE=
# The tokenizers library warns about its threads wherever a test forks a process.
export TOKENIZERS_PARALLELISM=false
if [ -n "$other" ]; then
    echo "test: versions that are not those of constraints.txt:"
    python -m pip --disable-pip-version-check freeze --exclude-editable | sed 's/_/-/g' |
        grep -ivxFf <(sed 's/;.*//' constraints.txt) || true
    pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    exit
fi
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
