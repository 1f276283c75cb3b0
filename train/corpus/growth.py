"""A corpus whose prompts change: answers that are there are kept, only new prompts are answered. Knows no model."""

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import DataError
from runtime.files import write_atomic
from runtime.text.prompts import Prompt
from train.corpus.prompts import SPLITS
from train.corpus.record import is_whole, read_record, write_record

logger = logging.getLogger(__name__)

# Rows of the corpus before, until the new one is complete.
EARLIER = "earlier.parquet"


def earlier_rows(folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt]) -> list[pa.Table]:
    """Answers that need not be made again: of a complete corpus of other prompts, or of one that is growing already.

    Args:
        settings: of the corpus that is asked for; the one that is there differs in `prompts` and `batch_size` at most.
        prompts: asked for; rows of others are left out.

    Returns:
        Rows as the splits have them, in one table; none where the corpus begins anew.

    Raises:
        DataError: they cannot be read.
    """
    there = read_record(folder).get("settings", {})
    growing = (folder / EARLIER).exists() and there.get("prompts") == settings["prompts"]
    if not growing and not is_whole(folder):
        return []
    paths = [folder / EARLIER] if growing else [folder / f"{split}.parquet" for split in SPLITS]
    try:
        table = pa.concat_tables([pq.read_table(path).replace_schema_metadata(None) for path in paths])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{folder}: its answers cannot be read ({reason}); delete the folder and run again") from error
    asked = {prompt.hash for prompt in prompts}
    return [table.filter(pa.array([digest in asked for digest in table["prompt_hash"].to_pylist()], pa.bool_()))]


def unanswered(prompts: Sequence[Prompt], earlier: Sequence[pa.Table]) -> list[Prompt]:
    """The prompts of which there are no rows."""
    answered = {digest for rows in earlier for digest in rows["prompt_hash"].to_pylist()}
    return [prompt for prompt in prompts if prompt.hash not in answered]


def begin_growth(folder: Path, earlier: Sequence[pa.Table], record: dict[str, Any]) -> None:
    """Write the record of an unfinished corpus; before that put rows aside, where some are kept."""
    for rows in earlier:
        logger.info("%d answers of the corpus before are kept", rows.num_rows)
        write_atomic(folder / EARLIER, partial(pq.write_table, rows))
        if is_whole(folder):
            shutil.rmtree(folder / "shards", ignore_errors=True)  # its batches
    write_record(folder, record)


def end_growth(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of the complete corpus, and forget the rows put aside: they are in its splits."""
    write_record(folder, record)
    (folder / EARLIER).unlink(missing_ok=True)
