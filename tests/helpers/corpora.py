"""Small corpora for the tests that make and compare them."""

import json

import pyarrow.parquet as pq

from runtime.text.prompts import Message, Prompt
from train.corpus.corpus import distil
from train.corpus.options import CorpusOptions
from train.corpus.prompts import SPLITS

EOS = 1
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}> {{ message['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = CorpusOptions(max_new_tokens=6, max_prompt_tokens=40, batch_size=4)
TURNS_2 = [Prompt((Message("user", f"w{n} w{n + 1}"),), ("w9 w8",) * (n % 3)) for n in range(14)]


def prompts(count: int) -> list[Prompt]:
    """Different prompts of one to five words."""
    return [Prompt((Message("user", " ".join(f"w{n + k}" for k in range(1 + n % 5))),)) for n in range(count)]


def rows(folder) -> list[dict]:
    """All rows of a corpus, split by split."""
    return [row for split in SPLITS for row in pq.read_table(folder / f"{split}.parquet").to_pylist()]


def files(folder) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record(folder) -> dict:
    """What a corpus says of itself."""
    return json.loads((folder / "corpus.json").read_text())


def run(model, tokenizer, asked, folder, options=OPTIONS, **others):
    """Make a corpus without a progress bar."""
    return distil(model, tokenizer, asked, folder, options, progress=False, **others)
