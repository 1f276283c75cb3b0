"""Layers of every family that runs natively: the bits of transformers' own, with windows and in trees too."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from runtime import SpeculationBounds, detach
from runtime.decoding.cache import Block, KVCache
from runtime.decoding.families import CACHE, FAMILIES, Family, family_of
from runtime.decoding.layers import NATIVE, DecoderLayers
from runtime.decoding.rows import TreeRows
from runtime.exact.attention import WINDOW_KINDS, BlockAttention
from runtime.exact.execution import ExecutionPolicy, execution, native_layers, prompt_layers
from runtime.exact.native.library import why_not_native
from runtime.exact.order import same_attention
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import compare
from runtime.exact.reference import Reference
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import INSIDE_ALONE, NATIVE_SHAPE, prompt, randomise
from tests.helpers.native.orders import torch_order

pytestmark = pytest.mark.usefixtures("whole_probes")  # beyond windows
WINDOW = 40  # filled in the midst of the text that is compared, of 24 tokens and 32
HALF: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": WINDOW}
USED = HALF | {"use_sliding_window": True}
TWO_TABLES: dict[str, Any] = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    }
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "internlm3": {},
    "iquestcoder": {},
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "seed_oss": {"attention_bias": True},
    "phi3": {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "mistral": {"sliding_window": WINDOW},
    "ministral": HALF,
    "cwm": HALF,
    "qwen2": USED,
    "qwen3": USED,
    "smollm3": USED | {"no_rope_layers": [1, 0, 1, 1]},
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": HALF | TWO_TABLES | {"query_pre_attn_scalar": 100},
    "olmo2": {},
    "olmo3": HALF | TWO_TABLES,
}


def base(family: str, **own: Any) -> PreTrainedModel:
    """A random model of sizes that the kernel takes, of four layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(NATIVE_SHAPE | {"num_hidden_layers": 4} | OWN[family] | own))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomise(model)
    return model


@cache
def kind_of(queries: int, keys: int) -> str:
    """The kind of attention that has torch's order here, also where windows are full."""
    if why_not_native() is not None or torch_order() is None:
        pytest.skip(f"no native kernels here, or torch attends in an order of its own: {why_not_native()}")
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "window": 37}
    own = [kind for kind in WINDOW_KINDS if kind.startswith(f"native_{torch_order()}_")]
    kinds = (k for k in own if same_attention(BlockAttention(k, "sdpa"), (queries, keys, 64), 2, **options))
    found = next(kinds, None)
    if found is None:
        pytest.skip("torch attends in an order of its own here where a window is full")
    return found


def policy_of(model: PreTrainedModel, packed: PackedLinears | None) -> ExecutionPolicy:
    """All of it natively, which the model's sizes allow."""
    assert packed is not None
    config = model.config
    kind = kind_of(config.num_attention_heads, config.num_key_value_heads)
    policy = ExecutionPolicy(kind, {}, packed_rows={joint.shape: None for joint in packed.joint}, native=True)
    if any(joint.layout.order is None for joint in packed.joint):
        pytest.skip("torch multiplies in an order of its own here")
    return policy


def differing(model: PreTrainedModel) -> int:
    """Rows with another bit than stock's, in logits, keys or values: one by one, and in blocks of 2 and 5."""
    packed = PackedLinears.of(model)
    policy = policy_of(model, packed)
    with torch.no_grad():
        reference = Reference.near(model)
        assert native_layers(model, policy, packed, BlockAttention(policy.attention, "sdpa")) is not None
        return compare(model, reference, policy, [2, 5], packed=packed).differing


def test_every_native_family_is_tried() -> None:
    """But those that are inside others alone, which `test_wrappers.py` tries."""
    assert set(OWN) == {name for name, family in FAMILIES.items() if family.norms} - set(INSIDE_ALONE)


@pytest.mark.parametrize("family", OWN)
def test_layers_have_the_bits_of_the_model_s_own(family: str) -> None:
    """From before the edge of a window to beyond it."""
    assert differing(base(family)) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", OWN)
def test_prompts_leave_the_bits_of_the_model_s_own_layers(family: str) -> None:
    """Logits, keys and values, in every order of additions that torch takes for so many rows, beyond windows too."""
    model = base(family)
    packed = PackedLinears.of(model)
    run = prompt_layers(model, policy_of(model, packed), packed)
    assert run is not None
    assert run.keeps_bits(model, prompt(64), (2, 17, 33, 64, 130))


@pytest.mark.parametrize("family", ["mistral", "olmo3", "gemma3_text"])
def test_beyond_a_window_from_the_start(family: str) -> None:
    """One of an odd number of keys; and with as many heads of keys as of queries, where the order may be another."""
    assert differing(base(family, sliding_window=19)) == 0
    assert differing(base(family, sliding_window=19, num_key_value_heads=4)) == 0


SPOILT: dict[str, tuple[str, dict[str, Any]]] = {
    "no window": ("mistral", {"windows": False}),
    "rounded before weighing": ("olmo2", {"weighing": "rounded"}),
    "rounded turns": ("olmo2", {"rounds_turns": True}),
    "no norm after attention": ("olmo2", {"norms": (None, None, None, "post_feedforward_layernorm")}),
    "weights not from one": ("gemma", {"weighing": "whole"}),
    "a norm too much": ("llama", {"norms": ("input_layernorm", "input_layernorm", "post_attention_layernorm", None)}),
}


@pytest.mark.parametrize("part", SPOILT)
def test_a_family_taken_for_another_shows(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what the probe compares sees it."""
    name, changes = SPOILT[part]

    def mistaken(config: Any) -> Family:
        return replace(family_of(config), **changes)

    monkeypatch.setattr("runtime.exact.execution.family_of", mistaken)
    assert differing(base(name)) > 0


@torch.no_grad()
@pytest.mark.parametrize("window", [9, 50, 53, 90])
def test_trees_see_the_last_keys_of_their_own_paths(window: int) -> None:
    """Beyond the window, at its edge within the tree, and before it: each node as its path alone, several requests."""
    model = base("mistral", sliding_window=window)
    packed = PackedLinears.of(model)
    policy = policy_of(model, packed)
    layers, ids = DecoderLayers(model), prompt(64)
    paths = ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 1, 3, 4), (0, 2, 5), (0, 2, 5, 6))
    tokens = prompt(len(paths))

    def cache_of(length: int) -> KVCache:
        prefix = DynamicCache(config=model.config)
        model(input_ids=ids[:, :length], **{CACHE: prefix})
        return KVCache.from_dynamic(prefix, 100)

    def block(length: int, given: torch.Tensor, tree: TreeRows | None = None) -> Block:
        return Block(layers.embed(given, length, tree), 0, 4, length, cache_of(length), tree)

    with execution(model, policy, packed):
        assert NATIVE in model.model.__dict__
        together = layers.run_all([block(n, tokens, TreeRows(n, paths)) for n in (49, 5)] + [block(60, tokens)])
        for length, found in zip((49, 5), together, strict=False):
            for row, path in enumerate(paths):
                alone = block(length, tokens[:, list(path)])
                assert torch.equal(found[:, row], layers.run_all([alone])[0][:, -1])
        chain = together[2]
    with execution(model, ExecutionPolicy.rowwise()):
        assert torch.equal(chain, layers.run_all([block(60, tokens)])[0])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "olmo3"])
def test_ids_are_those_of_plain_generate(family: str) -> None:
    """Greedy trees of drafts, right two times of three, from before the window's edge to beyond it."""
    model = base(family, sliding_window=16)
    policy_of(model, PackedLinears.of(model))
    stock = model.generate(prompt(7), do_sample=False, max_new_tokens=40)
    bounds = SpeculationBounds(0.2, 1, 8, max_branches=3, max_depth=4)
    attach(model, SpecBound(model, FakeHeads("mixed", [1], stock[0].tolist(), 96), bounds))
    assert torch.equal(model.generate(prompt(7), do_sample=False, max_new_tokens=40), stock)
    stats, certificate = model.specbound.stats, model.specbound.certificate
    detach(model)
    assert certificate.bitwise and certificate.policy.native and stats.accepted.total() > 5
