"""A corpus whose prompts change: it keeps the answers that it has, and only new prompts are answered. No model here."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import DataError
from runtime.files import write_atomic
from runtime.text.prompts import Prompt
from train.corpus.prompts import SPLITS
from train.corpus.record import is_whole, read_record

# Rows of the corpus before, until the new one is complete.
EARLIER = "earlier.parquet"


def earlier_rows(folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt]) -> pa.Table | None:
    """Answers that need not be made again: of a complete corpus of other prompts, or of one that is growing already.

    Args:
        settings: of the corpus that is asked for; the one that is there differs in `prompts` and `batch_size` at most.
        prompts: asked for; rows of others are left out.

    Returns:
        Rows as the splits have them; None where the corpus begins anew.

    Raises:
        DataError: they cannot be read.
    """
    there = read_record(folder).get("settings", {})
    growing = (folder / EARLIER).exists() and there.get("prompts") == settings["prompts"]
    if not growing and not is_whole(folder):
        return None
    paths = [folder / EARLIER] if growing else [folder / f"{split}.parquet" for split in SPLITS]
    try:
        table = pa.concat_tables([pq.read_table(path).replace_schema_metadata(None) for path in paths])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{folder}: its answers cannot be read ({reason}); delete the folder and run again") from error
    asked = {prompt.hash for prompt in prompts}
    return table.filter(pa.array([digest in asked for digest in table["prompt_hash"].to_pylist()], pa.bool_()))


def begin_growth(folder: Path, rows: pa.Table) -> None:
    """Put rows aside before the record says that the corpus is another one."""
    if not (folder / EARLIER).exists():
        write_atomic(folder / EARLIER, lambda file: pq.write_table(rows, file))
        shutil.rmtree(folder / "shards", ignore_errors=True)  # batches of the corpus before


def end_growth(folder: Path) -> None:
    """Forget the rows put aside: they are in the splits."""
    (folder / EARLIER).unlink(missing_ok=True)
