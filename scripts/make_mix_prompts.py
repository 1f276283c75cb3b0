"""Prompts of many kinds for a real fit, from public data sets that lie in one folder: one JSON object a line.

    python scripts/make_mix_prompts.py DATA_DIR OUT.jsonl [--mix code] [--scale 1.0]

`DATA_DIR` holds the files as their repositories publish them (the table below names each and its licence). Only
prompts are taken; the answers of a corpus are the base's own. Which rows are taken depends on their text alone.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LANGUAGES = {"deu": "German", "fra": "French", "spa": "Spanish"}


def _plain(field: str) -> Callable[[Row], Row]:
    return lambda row: {"prompt": row[field].strip()}


def _instruction(row: Row) -> Row:
    given = row.get("input") or (row.get("instances") or [{}])[0].get("input") or ""
    return {"prompt": "\n".join(part for part in (row["instruction"].strip(), given.strip()) if part)}


def _conversation(row: Row) -> Row:
    """The user's turns; what anybody else said is the base's to say."""
    return {"turns": [turn["value"] for turn in row["conversations"] if turn["from"] == "human"][:2]}


def _service(row: Row) -> Row:
    """A dialogue cut at a user's turn."""
    turns = row["turns"][: 2 * (len(row["turns"]) // 4) + 1]
    roles = {"USER": "user", "SYSTEM": "assistant"}
    return {"messages": [{"role": roles[turn["speaker"]], "content": turn["text"]} for turn in turns]}


# File, number of prompts at scale 1 (in the general mix, in that of code), and what a row is. Licences: gsm8k and
# GPTeacher MIT; self-instruct and LLaMA-Factory Apache-2.0; T0 sets their own terms; NTREX and SGD CC BY-SA 4.0.
SOURCES: list[tuple[str, tuple[int, int], Callable[[Row], Row]]] = [
    ("gsm8k/train.jsonl", (2000, 200), _plain("question")),
    ("gpteacher/codegen-instruct.json", (1500, 2000), _instruction),
    ("gpteacher/roleplay-instruct.json", (300, 100), _instruction),
    ("self_instruct/seed_tasks.jsonl", (175, 175), _instruction),
    ("self_instruct/user_oriented_instructions.jsonl", (252, 252), _instruction),
    ("t0_subset/cnn_dailymail.jsonl", (800, 100), _plain("prompt")),
    ("t0_subset/wiki_bio.jsonl", (300, 40), _plain("prompt")),
    ("t0_subset/common_gen.jsonl", (300, 0), _plain("prompt")),
    ("t0_subset/adversarial_qa.jsonl", (300, 60), _plain("prompt")),
    ("t0_subset/cosmos_qa.jsonl", (300, 40), _plain("prompt")),
    ("t0_subset/hotpotqa_kilt.jsonl", (200, 0), _plain("prompt")),
    ("sgd/sgd_turns_dev_test.jsonl", (0, 100), _service),
    ("llamafactory/dpo_en_demo.json", (150, 150), _conversation),
    ("llamafactory/glaive_toolcall_en_demo.json", (50, 50), _conversation),
]
TRANSLATIONS = (600, 60)
MIXES = ("general", "code")


def main() -> None:
    """Write the mix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mix", choices=MIXES, default=MIXES[0], help="which kinds of text")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of prompts")
    given = parser.parse_args()
    mix, prompts = MIXES.index(given.mix), []
    for name, counts, convert in SOURCES:
        prompts += _choose(map(convert, _rows(given.data / name)), round(counts[mix] * given.scale))
    prompts += _choose(_translations(given.data / "ntrex"), round(TRANSLATIONS[mix] * given.scale))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts in {given.out}")


def _rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: {path} cannot be read ({error.strerror}): give the folder that holds the data sets")
    if path.suffix == ".json":
        yield from json.loads(text)
    else:
        yield from (json.loads(line) for line in text.split("\n") if line.strip())


def _translations(folder: Path) -> Iterator[Row]:
    """Single sentences, from and into English in turn."""
    english = (folder / "newstest2019-src.eng.txt").read_text(encoding="utf-8").split("\n")
    for code, language in LANGUAGES.items():
        foreign = (folder / f"newstest2019-ref.{code}.txt").read_text(encoding="utf-8").split("\n")
        for number, (ours, theirs) in enumerate(zip(english, foreign, strict=False)):
            pair = ("English", language, ours) if number % 2 else (language, "English", theirs)
            if pair[2].strip():
                yield {"prompt": f"Translate {pair[0]} to {pair[1]}: {pair[2].strip()}"}


def _choose(prompts: Iterator[Row], count: int) -> list[Row]:
    """The `count` with the lowest hashes, each once."""
    unique = {hashlib.sha256(json.dumps(prompt).encode()).hexdigest(): prompt for prompt in prompts}
    return [unique[digest] for digest in sorted(unique)[:count]]


if __name__ == "__main__":
    main()
