"""Names of the files in an adapter's folder besides config and weights."""

from pathlib import Path

# A report of `specbound bench` for the card, copied there by hand or given to `publish`.
BENCH_FILE = "bench.json"
CALIBRATION_FILE, RUN_FILE, SPEED_FILE, CARD_FILE = "calibration.json", "run.yaml", "speed.json", "README.md"
CUSTOM_GENERATE = Path("custom_generate") / "generate.py"


def write_custom_generate(folder: Path) -> None:
    """Write the file that transformers runs for `custom_generate=ADAPTER`; see `runtime.custom_generate`."""
    target = folder / CUSTOM_GENERATE
    target.parent.mkdir(exist_ok=True)
    target.write_bytes((Path(__file__).parent / CUSTOM_GENERATE).read_bytes())
