"""`Shards`: one parquet file per finished batch of answers, written whole or not at all.

It does not depend on the model or on how the rows are used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.files import write_atomic
from train.corpus.answers import Turn

logger = logging.getLogger(__name__)

_IDS = pa.list_(pa.int32())
_COLUMNS = [("prompt_ids", _IDS), ("response_ids", _IDS), ("prompt_hash", pa.string())]
_COLUMNS += [("wave", pa.int32()), ("sampled", pa.bool_())]


@dataclass(frozen=True, slots=True)
class Shards:
    """The finished batches on disk; `key` identifies the settings, so that no shard of another run is used."""

    folder: Path
    key: str

    def read(self, batch: Sequence[Turn], *, name: str) -> pa.Table | None:
        """Read the rows of a batch; None if its shard is absent, damaged, or of another run or batch."""
        path = self.folder / f"{name}.parquet"
        if not path.exists():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s cannot be read (%s): the batch is generated again", path, error)
            return None
        same_run = (table.schema.metadata or {}).get(b"settings") == self.key.encode()
        if same_run and table["prompt_hash"].to_pylist() == [turn.prompt.hash for turn in batch]:
            return table
        logger.warning("%s belongs to another run: the batch is generated again", path)
        return None

    def write(self, batch: Sequence[Turn], responses: list[list[int]], *, name: str, wave: int) -> None:
        """Write the rows of a batch: its turns, in order, with the response ids of each."""
        columns = [[turn.prompt_ids for turn in batch], responses, [turn.prompt.hash for turn in batch]]
        columns += [[wave] * len(batch), [turn.sampled for turn in batch]]
        schema = pa.schema(_COLUMNS, metadata={"settings": self.key})
        table = pa.table(columns, schema=schema)
        write_atomic(self.folder / f"{name}.parquet", lambda file: pq.write_table(table, file))
