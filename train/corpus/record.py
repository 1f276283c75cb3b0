"""The record of a corpus: the settings that it is made with, what it holds, and whether it is complete."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError, DataError
from runtime.files import write_atomic
from runtime.text.prompts import Prompt
from train.corpus.options import CorpusOptions
from train.corpus.prompts import SPLITS


def corpus_settings(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, options: CorpusOptions, fingerprint: str
) -> dict[str, Any]:
    """What the rows depend on, as JSON; evaluation files matter only through the prompts that they leave."""
    generation = model.generation_config.to_diff_dict()
    generation.pop("transformers_version", None)
    settings = {"model": fingerprint, "dtype": str(model.dtype), "generation_config": digest(generation)}
    settings["tokenizer"] = digest([tokenizer.chat_template, tokenizer.get_vocab()])
    settings["prompts"] = digest(sorted(prompt.hash for prompt in prompts))
    chosen = asdict(options)
    del chosen["evaluation_files"]
    return {**settings, **chosen}


def digest(value: object) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def is_complete(folder: Path, *, settings: dict[str, Any]) -> bool:
    """Whether the corpus is there: padded or not, in batches of any size, the answers are the base's own.

    Raises:
        ConfigError: one of other settings is there. A complete one may be of other prompts: it can grow.
    """
    whole = is_whole(folder)
    check_settings(folder, settings, but=("batch_size", "prompts") if whole else ("batch_size",))
    return whole and read_record(folder)["settings"]["prompts"] == settings["prompts"]


def is_whole(folder: Path) -> bool:
    """Whether a complete corpus is there, of whatever settings."""
    return bool(read_record(folder).get("complete")) and all(
        (folder / f"{split}.parquet").exists() for split in SPLITS
    )


def begun_alone(folder: Path) -> bool:
    """Whether no answer of a corpus was made in a padded batch so far; one that was begun so goes on so."""
    return "batch_size" not in read_record(folder).get("settings", {})


def check_settings(folder: Path, settings: dict[str, Any], *, but: Sequence[str] = ()) -> None:
    """Raise ConfigError where the folder holds a corpus of other settings, of whatever names are not left out."""
    there = read_record(folder).get("settings", settings)
    names = sorted({*there, *settings}.difference(but))
    keys = [key for key in names if there.get(key) != settings.get(key)]
    if keys:
        differing = ", ".join(f"{key} ({there.get(key)!r} there, {settings.get(key)!r} now)" for key in keys)
        raise ConfigError(
            f"{folder} holds a corpus of other settings: {differing};"
            " use those settings or another corpus_dir, or delete the folder"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """What the record of a corpus says; nothing where there is none. DataError where it cannot be read."""
    path = folder / "corpus.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and run again") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise DataError(f"{path} is not the record of a corpus; delete it and run again")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a corpus in the place of the one that is there."""
    text = json.dumps(record, indent=2) + "\n"
    write_atomic(folder / "corpus.json", text.encode())
