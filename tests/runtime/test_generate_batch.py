"""`model.generate_batch`, and what docs/serving.md says of requests in Python."""

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin

from runtime import detach
from runtime.batch import Batch, many
from runtime.batch.many import generate_batch
from runtime.errors import ConfigError, SpecBoundError
from tests.helpers.paths import ROOT
from tests.helpers.speculation import GREEDY, PROMPTS, SAMPLED, adapted, alone, base


def test_generate_batch_is_transformers_call() -> None:
    """Its arguments and results; several sequences of a prompt have seeds one after the other."""
    model = base(torch.bfloat16)
    texts = alone(model, GREEDY)
    made = adapted(model, texts)
    found = made.generate_batch(PROMPTS, GenerationConfig(pad_token_id=0, **GREEDY), max_requests=3)
    assert list(found) == [f"req_{number}" for number in range(6)]
    assert [one.generated_tokens for one in found.values()] == texts
    assert [one.prompt_ids for one in found.values()] == PROMPTS and all(one.is_finished() for one in found.values())
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2}
    found = made.generate_batch(PROMPTS[:1], seeds=[7], **options)
    assert list(found) == ["req_0", "req_0__child#0"]
    stock = model.generate(torch.tensor(PROMPTS[:1]), **(options | {"num_return_sequences": 1}))
    chances = [float(row.log_softmax(-1).max()) for row in stock.scores]
    assert found["req_0"].logprobs == chances
    with pytest.raises(ConfigError, match="2 seeds for 1 prompt"):
        made.generate_batch(PROMPTS[:1], seeds=[7, 8], **GREEDY)


def test_it_takes_what_stock_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own arguments in the same order, with the same defaults; what of them means something is kept."""
    ours = inspect.signature(generate_batch).parameters
    theirs = inspect.signature(GenerationMixin.generate_batch).parameters
    expected = [(name, one.default) for name, one in theirs.items() if name not in ("self", "kwargs")]
    assert [(name, ours[name].default) for name in list(ours)[1 : len(expected) + 1]] == expected
    model = base(torch.float32)
    texts = alone(model, GREEDY)
    made = adapted(model, texts)
    config = ContinuousBatchingConfig(max_requests_per_batch=2, return_logprobs=True, seed=5)
    rooms: list[int] = []
    monkeypatch.setattr(many, "Batch", lambda model, room: rooms.append(room) or Batch(model, room))
    given = (GenerationConfig(pad_token_id=0, **GREEDY), config, True)
    found = made.generate_batch(PROMPTS[:3], *given, persistent_manager=True, warmup=False, progress_bar=False)
    assert [one.generated_tokens for one in found.values()] == texts[:3] and rooms == [2]
    for one in found.values():
        assert len(one.logprobs) == len(one.timestamps) == 24 and max(one.logprobs) < 0
        assert one.timestamps == sorted(one.timestamps) and one.created_time < one.timestamps[0]
    plain = made.generate_batch(PROMPTS[:1], **GREEDY)["req_0"]
    assert plain.timestamps is None and plain.logprobs == []
    sampled = [made.generate_batch(PROMPTS[:2], None, config, **SAMPLED) for _ in range(2)]
    first, second = ([one.generated_tokens for one in run.values()] for run in sampled)
    assert first == second and made.generate_batch([], **GREEDY) == {}


def test_requests_that_are_fed() -> None:
    """Each has stock's ids under its own options, whoever comes while it runs; one that is refused stops nobody."""
    model = base(torch.float32)
    made = adapted(model, alone(model, GREEDY))
    expected = [
        alone_with(model, ids, seed=number, **(SAMPLED if number % 2 else GREEDY) | {"max_new_tokens": 4 + 5 * number})
        for number, ids in enumerate(PROMPTS[:4])
    ]
    told: dict[int, list[int]] = {}
    seen: list[int] = []  # requests under way when another was taken

    def requests() -> Iterator[Any]:
        for number, ids in enumerate(PROMPTS[:4]):
            options = (SAMPLED if number % 2 else GREEDY) | {"max_new_tokens": 4 + 5 * number, "seed": number}
            yield {"input_ids": ids} | options
            before = sum(map(len, told.values()))
            while sum(map(len, told.values())) < min(before + 2, before + 1 + number):
                yield None  # the next comes when those have gone on
            seen.append(len(told))
        yield {"input_ids": PROMPTS[0], "num_beams": 2}
        yield {"input_ids": PROMPTS[5], **GREEDY}

    ended, errors = [], {}
    for piece in made.specbound.stream(requests(), max_requests=3):
        told.setdefault(piece.number, []).extend(piece.ids)
        ended += [piece.number] if piece.ended else []
        errors |= {piece.number: piece.error} if piece.error else {}
    assert [told[number] for number in range(4)] == expected and told[5] == alone(model, GREEDY)[5]
    assert sorted(ended) == list(range(6)) and list(errors) == [4] and isinstance(errors[4], ConfigError)
    assert seen[1:] == sorted(seen[1:]) and seen[-1] > 1
    again = copy.deepcopy(made)  # an adapter streams on its own model
    del made
    pieces = again.specbound.stream([{"input_ids": PROMPTS[0], **GREEDY}])
    assert next(pieces).ids
    pieces.close()
    handle = again.specbound
    detach(again)
    with pytest.raises(SpecBoundError, match="at work on no model"):
        handle.stream([])


def alone_with(model: Any, ids: list[int], *, seed: int, **options: Any) -> list[int]:
    """New ids of stock's `generate` under a seed."""
    torch.manual_seed(seed)
    found: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return found


def test_the_documented_snippets(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of docs/serving.md that need no server."""

    class Numbers:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    model = base(torch.float32)
    model.generation_config.do_sample = False
    longer = GREEDY | {"max_new_tokens": 128}
    expected = alone(model, longer)
    names = {"model": adapted(model, expected), "tokenizer": Numbers(), "prompts": PROMPTS[:2], "streamer": None}
    names |= {"ids": PROMPTS[0], "other_ids": PROMPTS[1]}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.DOTALL)
    snippets = [snippet for snippet in snippets if "client" not in snippet]
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "serving.md", "exec"), dict(names))
    first, second, *pieces, third = capsys.readouterr().out.splitlines()
    assert {piece[:3] for piece in pieces} == {"0 [", "1 ["}
    assert [first, second] == [" ".join(map(str, ids)) for ids in expected[:2]] and third == str(expected[0])
