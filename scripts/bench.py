"""`specbound bench` as a script: methods side by side on the same prompts. Example:
python scripts/bench.py --adapter adapters/smollm2-135m-instruct --prompts prompts.jsonl --limit 16 --json bench.json
"""

import typer

from train.cli import bench_command

if __name__ == "__main__":
    typer.run(bench_command)
