"""The corpus: prompts answered by the base model itself, or as the data does, as token ids, in three splits.

Where prompts that are answered together share the weights (`EngineAnswerer`), each has the answer that the base alone
gives it; elsewhere they are padded to one batch, whose rounding is its own, and the record says of what size.
Each finished batch is a shard on disk, so a run that was killed repeats no finished batch when it is resumed.
Multi-turn prompts are answered wave by wave: wave 1 asks the second turns, after the model's own first answers. On one
machine and one set of versions a resumed run gives the same corpus. A complete corpus grows when prompts are added:
only they are answered.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import ConfigError, DataError
from runtime.files import write_atomic
from runtime.text.prompts import Prompt
from train.corpus.answers import Answerer
from train.corpus.conversation import Conversation
from train.corpus.engine import EngineAnswerer
from train.corpus.given import GivenAnswerer, own_tokens
from train.corpus.growth import begin_growth, earlier_rows, end_growth, unanswered
from train.corpus.options import CorpusOptions
from train.corpus.prompts import (
    SPLITS,
    assign_split,
    deduplicate,
    ngram_filter,
    prompts_left,
    special_tokens,
    token_warnings,
)
from train.corpus.record import (
    begun_alone,
    check_settings,
    corpus_settings,
    digest,
    is_complete,
    read_record,
)
from train.corpus.remote import RemoteAnswerer
from train.corpus.shards import Shards
from train.corpus.waves import Waves

logger = logging.getLogger(__name__)

SAMPLE = 64  # rows of given answers that the base looks at
# Below this given answers are told to be foreign; of SmolLM2-135M's own, those sampled at temperature 0.7 have 0.77.
LOW_SHARE = 0.7


def distil(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    output_dir: str | Path,
    options: CorpusOptions,
    *,
    fingerprint: str = "",
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    progress: bool = True,
    generator: str | None = None,
    given: Sequence[Conversation] | None = None,
    skipped: Mapping[str, int] | None = None,
    together: bool = False,
) -> Path:
    """Answer the prompts with the model and write the corpus; returns its folder, at once if it is complete.

    Args:
        model: a causal language model with `generate`, on its device; it is put into evaluation mode.
        prompts: equal ones are dropped and counted; their order does not matter.
        output_dir: a folder that every process reads and writes.
        fingerprint: names the model's weights; a corpus made under another one is refused.
        rank, world_size: this process answers the batches whose index modulo `world_size` is `rank`.
        barrier: waits for all processes.
        generator: URL of an engine that serves the same model and answers in its place, see `RemoteAnswerer`.
        given: the prompts' conversations, whose answers are kept: nothing is generated, see `GivenAnswerer`.
        skipped: for the record: rows of the sources that could not be understood, by reason.
        together: the model is sharded over the processes, so all must run it equally often.

    Raises:
        ConfigError: the folder holds a corpus of other settings, or no room for a prompt is left.
        DataError: no usable prompt, no usable chat template, or a shard of another process is not there.
    """
    folder, (unique, num_duplicates) = Path(output_dir), deduplicate(prompts)
    kept, dropped = ngram_filter(unique, evaluation_files=options.evaluation_files)
    settings = corpus_settings(model, tokenizer, kept, options=options, fingerprint=fingerprint)
    settings |= {} if generator is None else {"external": True}
    settings |= {} if given is None else {"answers": digest(sorted((one.prompt.hash, one.answers) for one in given))}
    if is_complete(folder, settings=settings):
        return folder
    parts = model.eval(), tokenizer, options
    earlier = earlier_rows(folder, settings, kept)
    alone = bool(earlier) or begun_alone(folder)
    answerer = _answerer(parts, fingerprint, generator=generator, given=given, together=together, alone=alone)
    shared = generator is not None and together  # all check the same answers, which the first process writes
    if isinstance(answerer, EngineAnswerer):
        del settings["batch_size"]  # no answer depends on it
    check_settings(folder, settings, but=("batch_size", "prompts") if earlier else ())
    shards = Shards(folder / "shards", hashlib.sha256(json.dumps(settings).encode()).hexdigest())
    barrier()  # rank 0 writes nothing before all have read what was there
    if rank == 0:
        begin_growth(folder, earlier, {"settings": settings, "complete": False})
        _warn_of_tokens(tokenizer, kept, given)
    waves = Waves(answerer, shards, rank, 1 if shared else world_size, barrier, progress)
    tables, num_too_long = waves.run(unanswered(kept, earlier))
    counts: dict[str, Any] = {"prompts": len(kept), "duplicates": num_duplicates, "sharing_13_words": len(dropped)}
    counts |= {"too_long": num_too_long} | ({"skipped": dict(skipped)} if skipped else {})
    counts |= _write_splits(folder, [*tables, *earlier], options=options) if rank == 0 else {}
    barrier()  # all read the splits
    if given is not None and (rank == 0 or together):
        counts["greedy_agreement"] = _own_share(folder, model)
    if rank == 0:
        end_growth(folder, {"settings": settings, "counts": counts, "complete": True})
    barrier()  # no process returns before the corpus is complete
    return folder


def _answerer(
    parts: tuple[Any, Any, CorpusOptions],
    fingerprint: str,
    *,
    generator: str | None,
    given: Sequence[Conversation] | None,
    together: bool,
    alone: bool,
) -> Answerer:
    """Whoever answers: another engine, the data, or the base, in padded batches unless `alone`; see `distil`."""
    if generator is not None:
        return RemoteAnswerer(*parts, generator, together=together)
    if given is not None:
        return GivenAnswerer(*parts, given, together=together)
    if together or not alone:
        return Answerer(*parts, together=together)
    return EngineAnswerer.of(*parts, fingerprint=fingerprint) or Answerer(*parts)


def load_split(corpus_dir: str | Path, split: str) -> datasets.Dataset:
    """One split of a complete corpus, ordered by prompt hash and wave.

    Rows hold `prompt_ids` and `response_ids` (lists of int32), `prompt_hash` (text), `wave` (int) and
    `sampled` (bool). A response ends with its end-of-sequence token where it has one.

    Raises:
        ConfigError: no such split.
        DataError: the corpus is missing, incomplete or damaged, or the split is empty.
    """
    folder = Path(corpus_dir)
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    record = read_record(folder)
    if not record.get("complete"):
        state = "is not complete" if record else "holds no corpus"
        raise DataError(f"{folder} {state}; run train/distil.py with this corpus_dir to make or finish it")
    try:
        table = pq.read_table(folder / f"{split}.parquet", memory_map=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{folder}: {split}.parquet cannot be read ({reason}); delete it and run again") from error
    if not table.num_rows:
        raise DataError(
            f"{folder}: the {split} split is empty ({prompts_left(record.get('counts', {}))});"
            f" use more prompts or another {split}_fraction"
        )
    return datasets.Dataset(table)


def counts_of(corpus_dir: Path) -> dict[str, Any]:
    """What a complete corpus says of its rows and of what was left out."""
    counts: dict[str, Any] = read_record(corpus_dir)["counts"]
    return counts


def _warn_of_tokens(tokenizer: Any, prompts: Sequence[Prompt], given: Sequence[Conversation] | None) -> None:
    """Warn of special tokens in the text of prompts and of given answers."""
    asked = {prompt.hash for prompt in prompts}
    answered = {one.prompt.hash: one.answers for one in reversed(given or ()) if one.prompt.hash in asked}
    texts = {"prompts": ["\n".join(prompt.texts) for prompt in prompts]}
    texts["answers"] = [answer for answers in answered.values() for answer in answers]
    for said in token_warnings(texts, special_tokens(tokenizer)):
        logger.warning("%s", said)


def _own_share(folder: Path, model: Any) -> float:
    """Share of the tokens of some given answers that the base would choose; warns where it is low."""
    tables = [pq.read_table(folder / f"{split}.parquet") for split in SPLITS]
    table = pa.concat_tables(table for table in tables if table.num_rows)
    number = min(SAMPLE, table.num_rows)
    rows = table.take([index * table.num_rows // number for index in range(number)]).to_pylist()
    own, total = own_tokens(model, [(row["prompt_ids"], row["response_ids"]) for row in rows])
    share = round(own / max(1, total), 4)
    low = share < LOW_SHARE
    logger.log(
        logging.WARNING if low else logging.INFO,
        "of %d tokens of the given answers the base would choose %.0f %% itself%s",
        total,
        100 * share,
        ": heads learn on text that it does not write, so expect fewer accepted drafts when it does; `answers: distil`"
        " lets it answer the prompts itself" if low else "",
    )  # fmt: skip
    return share


def _write_splits(folder: Path, tables: list[pa.Table], *, options: CorpusOptions) -> dict[str, Any]:
    """Write the rows, ordered by prompt hash and wave, as a file per split. Returns the sizes of each."""
    if not tables:
        raise DataError(
            "no prompt is left to answer: all are too long, duplicates or of an evaluation file;"
            " give other prompts or raise max_prompt_tokens"
        )
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    table = table.sort_by([("prompt_hash", "ascending"), ("wave", "ascending")])
    fractions = {"calibration_fraction": options.calibration_fraction}
    fractions["held_out_fraction"] = options.held_out_fraction
    splits = [assign_split(name, **fractions) for name in table["prompt_hash"].to_pylist()]
    counts: dict[str, Any] = {"rows": {}, "response_tokens": {}}
    for split in SPLITS:
        rows = table.filter(pa.array([name == split for name in splits], pa.bool_()))
        write = datasets.Dataset(rows).to_parquet
        write_atomic(folder / f"{split}.parquet", write)
        counts["rows"][split] = rows.num_rows
        counts["response_tokens"][split] = sum(map(len, rows["response_ids"].to_pylist()))
    return counts
