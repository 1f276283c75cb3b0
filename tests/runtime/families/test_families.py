"""Families whose layers run as they are: layer by layer the model itself, and ids whatever is drafted."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from runtime import UnsupportedModel
from runtime.decoding import families
from runtime.decoding.arguments import LayerArguments, LentKeys
from runtime.decoding.cache import KVCache
from runtime.decoding.families import layers_with_keys, numbers_per_token, own_attentions
from runtime.decoding.layers import DecoderLayers
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.probe import compare
from runtime.exact.reference import Reference
from runtime.exact.running import why_stock
from tests.helpers.cells import GREEDY, SAMPLED, check
from tests.helpers.families import (
    FAMILIES,
    FURTHER,
    INSIDE_ALONE,
    MIXTURES,
    TURNED,
    model_type,
    prompt,
    require,
    tiny,
)

DTYPES = [torch.float32, torch.bfloat16]


def states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states below each layer, and the logits, by the parts that decoding uses."""
    layers = DecoderLayers(model)
    keyed = layers_with_keys(model.config)
    found, cache = [layers.embed(ids, 0)], KVCache(keyed, ids.shape[1])
    # sdpa hides later keys of a whole text by itself; eager attention needs a mask, as do modules that take one row
    masked = model.config._attn_implementation == "eager" or own_attentions(model)
    with execution(model, ExecutionPolicy.batched()) if masked else nullcontext():
        for depth in range(layers.num_layers):
            found.append(layers.run(found[-1], depth, depth + 1, 0, cache, tokens=ids[0].tolist()))
    kept = [part[0, :, 0].numel() for depth in range(keyed) for part in cache.rows(depth, 0)]
    assert sum(kept) == numbers_per_token(model)
    return [*found[:-1], layers.logits(found[-1])]


def test_every_family_is_tried() -> None:
    """A family that is accepted has a tiny model here."""
    tried = {model_type(name) for name in [*FAMILIES, *FURTHER, *MIXTURES]}
    assert tried | set(INSIDE_ALONE) == set(families.FAMILIES) and tried.isdisjoint(INSIDE_ALONE)
    assert len(families.FAMILIES) >= 93


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES | FURTHER | MIXTURES | TURNED))
@torch.inference_mode()
def test_parts_are_the_model_s_own_forward(family: str, dtype: torch.dtype) -> None:
    """Every bit below every layer, and of the logits."""
    require(family)
    model, ids = tiny(family, dtype=dtype), prompt(20)
    expected = model(ids, output_hidden_states=True)
    found = states(model, ids)
    for own, stock in zip(found, [*expected.hidden_states[:-1], expected.logits], strict=True):
        assert torch.equal(own, stock)


@pytest.mark.parametrize(
    ("family", "line", "settings"),
    [
        ("phi", families.Family(norm="embed_dropout"), {}),
        ("cohere", families.Family(), {}),
        ("hyperclovax", families.Family(), {}),
        ("gemma2", families.Family(by_layer=True), {"final_logit_softcapping": None}),
    ],
)
@torch.inference_mode()
def test_a_part_too_few_shows(
    family: str, line: families.Family, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: another module in the place of the final norm, and logits without their scale or cap."""
    monkeypatch.setitem(families.FAMILIES, family, line)
    model, ids = tiny(family), prompt(20)
    stock = model(ids).logits
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert not torch.equal(states(model, ids)[-1], stock)


@pytest.mark.parametrize("part", ["keys", "inputs"])
@torch.inference_mode()
def test_links_that_are_wrong_show(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: keys of a layer that lends none, and inputs of layers of the tokens the other way round."""
    add = LayerArguments.add_inputs
    if part == "keys":
        monkeypatch.setattr(LentKeys, "__getitem__", lambda self, kind: self.cache.rows(0, 0))
    else:
        monkeypatch.setattr(LayerArguments, "add_inputs", lambda *given: add(*given[:3], given[3].flip(1), given[4]))
    model, ids = tiny("gemma4_text with inputs of each layer"), prompt(20)
    assert not torch.equal(states(model, ids)[-1], model(ids).logits)


@pytest.mark.parametrize("family", sorted(MIXTURES))
@torch.inference_mode()
def test_experts_take_one_row_at_a_time(family: str) -> None:
    """Negative control: with the rows of a block together they add in another order."""
    require(family)
    model = tiny(family)
    reference = Reference.near(model)
    assert compare(model, reference, ExecutionPolicy.rowwise(), [3]).differing == 0
    assert compare(model, reference, replace(ExecutionPolicy.rowwise(), expert_rows=None), [3, 5]).differing > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "falcon", "gpt_neo", "jetmoe"])
@torch.inference_mode()
def test_attention_on_its_own_takes_one_row_at_a_time(family: str) -> None:
    """Negative control: with the rows of a block together, behind a mask, it adds in another order."""
    model = tiny(family)
    assert own_attentions(model)
    reference = Reference.near(model)
    assert compare(model, reference, ExecutionPolicy.rowwise(), [3]).differing == 0
    assert compare(model, reference, replace(ExecutionPolicy.rowwise(), attention="batched"), [3]).differing > 0


def test_experts_that_change_after_the_prompt_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU plain decoding takes another kernel than the prompt; ones that nobody knows may do anything."""
    model = tiny("mixtral")
    assert why_stock(model) is None
    model.set_experts_implementation("batched_mm")
    assert why_stock(model) is None
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", lambda *args: args)
    assert "experts implementation is 'batched_mm'" in str(why_stock(model))
    meta = tiny("mixtral").to("meta")
    assert "changes after the prompt" in str(why_stock(meta))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES | FURTHER | MIXTURES | TURNED))
def test_ids_are_stock_s(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one greedy call and one sampled; rotary positions that switch do so on the way."""
    require(family)
    check(tiny(family, dtype=dtype), [(7, GREEDY), (9, SAMPLED)], monkeypatch)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("minimax_m2", {"sliding_window": 8}, "windows, which nobody has tried"),
        ("granitemoehybrid", {"layer_types": ["linear_attention"] * 4}, "layers of the kinds linear_attention"),
        ("opt", {"word_embed_proj_dim": 24}, "an embedding of another size than its layers"),
        ("opt", {"do_layer_norm_before": False}, "no norm above its layers"),
        ("falcon", {"alibi": True}, "positions that are biases of attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "tokens see those after them"),
        ("olmo3", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "'dynamic' rotary"),
    ],
)
def test_what_a_family_may_have_besides_is_refused(family: str, options: dict[str, object], reason: str) -> None:
    """By name."""
    model = tiny(family)
    for name, value in options.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModel, match=reason):
        DecoderLayers(model)
