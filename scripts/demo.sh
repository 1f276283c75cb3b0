#!/usr/bin/env bash
# The whole road on a small real model: get it, distil, fit, calibrate, publish to a folder, tune, generate, compare.
# Everything lands in outputs/; stopped half-way, run it again: finished stages are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh train

export TOKENIZERS_PARALLELISM=false
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import torch; print(torch.get_num_threads())')}
export OMP_NUM_THREADS
recipe=configs/fit/smollm2-demo.yaml
launch="accelerate launch --config_file configs/accelerate/cpu.yaml"

echo "1/5 the base model"
python scripts/fetch_smollm2.py
echo "2/5 its own answers to 540 prompts"
$launch train/distil.py --config $recipe
echo "3/5 exit heads: fit, calibrate, publish to outputs/demo/adapter"
$launch train/fit_exits.py --config $recipe --resume_from_checkpoint latest
echo "4/5 what rounds cost on this machine, and the bounds for it"
specbound profile --adapter outputs/demo/adapter --json outputs/demo/costs.json
specbound tune --adapter outputs/demo/adapter --costs outputs/demo/costs.json
echo "5/5 plain decoding against SpecBound"
python scripts/demo.py
