#!/usr/bin/env bash
# All that this project wants to know of a GPU, in one command of under ten minutes and without a download; see gpu.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python scripts/measure/gpu.py "$@"
