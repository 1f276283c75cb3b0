"""`model.generate_batch`, and what docs/serving.md says of requests in Python."""

import re

import pytest
import torch
from transformers import GenerationConfig

from runtime.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.speculation import GREEDY, PROMPTS, adapted, alone, base


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
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "serving.md", "exec"), dict(names))
    first, second, third = capsys.readouterr().out.splitlines()
    assert [first, second] == [" ".join(map(str, ids)) for ids in expected[:2]] and third == str(expected[0])
