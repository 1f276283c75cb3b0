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
mypy runtime train
# Two at a time: tests run on one thread each, and a file stays in one process; long files first (tests/conftest.py).
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
