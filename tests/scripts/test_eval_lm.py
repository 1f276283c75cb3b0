"""lm-eval with and without SpecBound: the same texts, and a model that writes others is reported."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from runtime import ConfigError, load_specbound
from runtime.decoding.emitter import TargetEmitter
from tests.helpers.paths import ROOT
from tests.helpers.scripts import script

pytest.importorskip("lm_eval")
# Of third parties, on import.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def eval_lm() -> Any:
    return script("measure/eval_lm")


@pytest.fixture
def adapted(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A tiny model with an adapter, and its tokenizer; the folder is the repository's, where the tasks lie."""
    base = demo_outputs / "outputs/base/smollm2-135m-instruct"
    monkeypatch.chdir(ROOT)
    return load_specbound(demo_outputs / "outputs/demo/adapter", str(base)), AutoTokenizer.from_pretrained(base)


def test_the_same_texts(adapted: Any, eval_lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = eval_lm.compare(*adapted, ["sums"], 2)
    assert found["items"] == 2 and found["different"] == []
    assert found["plain"]["tokens"] == found["specbound"]["tokens"] == 256
    assert found["plain"]["scores"] == found["specbound"]["scores"]
    assert adapted[0].specbound.stats.rounds > 0
    eval_lm.show(found | {"hardware": "none", "dtype": "float32", "threads": 1})
    assert "2 of 2 items with the same text" in capsys.readouterr().out


def test_altered_ids_are_reported(adapted: Any, eval_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one token of ours is not the one that plain decoding chooses."""
    stock = TargetEmitter.emit

    def altered(self: TargetEmitter, logits: torch.Tensor) -> tuple[int, bool]:
        if self.emitted == 4:
            logits = logits.clone()
            logits[0, logits.argmax()] = -torch.inf
        return stock(self, logits)

    monkeypatch.setattr(TargetEmitter, "emit", altered)
    assert eval_lm.compare(*adapted, ["sums"], 2)["different"] == ["sums 0", "sums 1"]


def test_what_cannot_be_compared(adapted: Any, eval_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = partial(eval_lm.TaskManager, include_path=str(eval_lm.LOCAL_TASKS), include_defaults=False)
    monkeypatch.setattr(eval_lm, "TaskManager", lambda **options: manager())  # its own take seconds to look through
    with pytest.raises(ConfigError, match="no task nothing"):
        eval_lm.compare(*adapted, ["nothing"], 2)
    with pytest.raises(ConfigError, match="expected generation tasks"):
        eval_lm.Timed(*adapted).loglikelihood([])
