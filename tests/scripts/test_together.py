"""The script that measures many prompts together, on a tiny model: every way is there, and ours have stock's ids."""

from typing import Any

import pytest

from runtime import SpeculationBounds, detach
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.scripts import script

IDS = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]


def test_every_way(
    make_model: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice; ids of the ways that are ours are stock's, rows and first tokens are counted."""
    together, model, rows = script("together"), make_model(), dict[str, Any]()
    monkeypatch.setattr(together, "NEW_TOKENS", 6)
    attach(model, SpecBound(model, FakeHeads("random", [2, 4], vocabulary=3), SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    for _ in range(2):
        together.measure(model, make_model(), make_tokenizer(), IDS, [2], rows)
    for way in ("plain loop", "SpecBound"):
        for name in (f"{way}, one by one", f"{way}, 2 together"):
            assert rows[name]["identical"] == len(IDS) and "rows" not in rows[name]
            assert all(len(rows[name][figure]) == 2 for figure in together.FIGURES[:3])
    padded, batch = rows["stock, padded batches of 2"], rows["stock, generate_batch, 2 together"]
    assert len(padded["tokens_per_second"]) == 2 and ("note" in batch or len(batch["first_token_seconds"]) == 2)
    together.show(rows, [together.block_rows(model)])
    assert "a block of 16 rows alone" in capsys.readouterr().out
    detach(model)
