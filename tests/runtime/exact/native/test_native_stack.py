"""Runs of layers in our own kernel: the bits of transformers' modules, family by family, and refused otherwise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from runtime.decoding.cache import Block, KVCache
from runtime.decoding.families import CACHE
from runtime.decoding.layers import NATIVE, DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.exact.attention import BlockAttention
from runtime.exact.certificate import Certificate
from runtime.exact.execution import execution
from runtime.exact.native import stack as native
from runtime.exact.native.library import why_not_native
from runtime.exact.native.tables import KEPT, RotaryTables, table_of
from runtime.exact.order import same_norm
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import probe
from tests.helpers.families import NATIVE_SHAPE, randomise
from tests.helpers.native.orders import torch_order

HALF: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 20}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "qwen3": {},
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "olmo3": HALF,
    "gemma3_text": HALF,
}


def base(family: str, **own: Any) -> PreTrainedModel:
    """A random model of sizes that the kernel takes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(NATIVE_SHAPE | OWN[family] | own))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomise(model)
    return model


def probed(model: PreTrainedModel) -> tuple[Certificate, PackedLinears]:
    """Its certificate and packed Linears; skips where this machine has no kernel in torch's order."""
    packed = PackedLinears.of(model)
    if why_not_native() is not None or packed is None:
        pytest.skip(f"no native kernels here: {why_not_native()}")
    certificate = probe(model, max_width=5, packed=packed)
    if torch_order() is None or not certificate.native:
        pytest.skip("torch adds in an order of its own here")
    assert certificate.policy.attention.startswith("native")
    return certificate, packed


@pytest.mark.parametrize("family", OWN)
def test_layers_have_the_bits_of_the_model_s_own(family: str) -> None:
    """Under the policy that the probe finds; `test_native_families.py` tries every family."""
    model = base(family)
    certificate, _ = probed(model)
    kind = certificate.policy.attention
    if getattr(model.config, "sliding_window", None) and BlockAttention(kind, "sdpa").filled is None:
        assert certificate.bitwise and not certificate.policy.native
        pytest.skip("torch attends in an order of its own here where a window is full")
    assert certificate.bitwise and certificate.policy.native
    assert "layers native" in str(certificate)


@pytest.mark.parametrize("own", [{"head_dim": 48}, {"intermediate_size": 96}, {"hidden_act": "relu"}], ids=str)
def test_what_the_kernel_does_not_take_runs_as_before(own: dict[str, Any]) -> None:
    """Sizes that fill no vector, another activation: exact, and not native."""
    certificate, _ = probed(base("llama", **own))
    assert certificate.bitwise and not certificate.policy.native


def spoilt_silu(activation: nn.Module) -> Tensor:
    """Rounded otherwise than torch's."""
    table = table_of(activation)
    table[0x3F00:0x3F80] = torch.nextafter(table[0x3F00:0x3F80], torch.tensor(9.0, dtype=torch.bfloat16))
    return table


SPOILT: dict[str, tuple[str, Any]] = {
    "SiLU": ("table_of", spoilt_silu),
    "rows": ("_row", lambda parts, packed, _, row=native._row: row(parts, packed, -1)),  # heads are not turned
    "norms": ("_row", lambda parts, *more, row=native._row: row(replace(parts, norms=parts.norms[::-1]), *more)),
}


@pytest.mark.parametrize("part", SPOILT)
def test_a_spoilt_kernel_is_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the probe sees it and takes another way, which is exact."""
    model = base("llama")
    monkeypatch.setattr(native, *SPOILT[part])
    certificate, _ = probed(model)
    assert certificate.bitwise and not certificate.policy.native


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_tree_has_the_bits_of_its_paths(family: str) -> None:
    """Logits, keys and values of every node are those of its path, token by token; what is kept is the path's."""
    model = base(family)
    certificate, packed = probed(model)
    layers, ids = DecoderLayers(model), torch.arange(2, 50).tolist()  # the tree lies across a vector of keys
    parents, tokens = [0, 0, 1, 1, 2, 5, 3, 7, 8, 0], [5, 9, 9, 7, 3, 11, 2, 8, 4, 1]

    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: prefix})

    def state() -> DecodeState:
        made = DecodeState(layers, KVCache.from_dynamic(prefix, 64), ids)
        made.push(ids[0])
        return made

    with torch.no_grad(), execution(model, certificate.policy, packed):
        tree = state()
        for token, parent in zip(tokens, parents, strict=True):
            tree.push(token, parent)
            tree.advance(len(tree.pending) % 3)
        found = tree.verify()[0]
        written = [[tensor.clone() for tensor in tree.cache.rows(index, tree.length)] for index in range(3)]
        for node, path in enumerate(list(tree.paths)):
            alone = state()
            for token in tree.tokens(node)[1:]:
                alone.verify()
                alone.settle([0])
                alone.push(token)
            assert torch.equal(found[node], alone.verify()[0, -1])
            for index in range(3):
                rows = alone.cache.rows(index, tree.length)
                assert all(
                    torch.equal(mine[:, :, path], other) for mine, other in zip(written[index], rows, strict=True)
                )
        path = tree.paths[9]
        tree.settle(path)
        for index in range(3):
            kept = tree.cache.rows(index, len(ids))
            assert all(torch.equal(mine, old[:, :, path]) for mine, old in zip(kept, written[index], strict=True))


@pytest.mark.parametrize("size", [64, 100, 256, 576, 2048, 4096, 8192])
def test_norms_add_in_the_order_of_torch(size: int) -> None:
    """Of each row alone, at sizes that fill vectors and levels and those that do not; a sum backwards is refused."""
    if why_not_native() is not None:
        pytest.skip(f"no native kernels here: {why_not_native()}")
    norm = LlamaRMSNorm(size, 1e-5).to(torch.bfloat16)
    assert same_norm(norm, native.norms)
    assert not same_norm(norm, lambda module, rows: native.norms(module, rows.flip(1)).flip(1))


def test_states_that_are_no_numbers_go_to_torch() -> None:
    """The run says that it cannot; the cache is as it was, and the block is what the layers give one by one."""
    model = base("llama")
    certificate, packed = probed(model)
    ids = torch.arange(2, 12)[None]
    stock = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, **{CACHE: stock})
        cache, layers = KVCache.from_dynamic(stock, 32), DecoderLayers(model)
        hidden = layers.embed(ids[:, :3], 10)
        hidden[0, 1, 7] = torch.inf
        with execution(model, certificate.policy, packed):
            run = model.model.__dict__[NATIVE]
            assert run([Block(hidden, 0, 3, 10, cache)]) is None and cache.lengths == [10] * 3
            block = layers.run(hidden, 0, 3, 10, cache)
        assert NATIVE not in model.model.__dict__ and cache.lengths == [13] * 3
        alone = layers.run(hidden[:, :1], 0, 3, 10, KVCache.from_dynamic(stock, 32))
    assert torch.equal(block[:, :1], alone) and not torch.isfinite(block[:, 1]).all()


def test_angles_that_are_kept_are_those_of_their_positions() -> None:
    """Again and again, side by side or apart, and where two positions would stand in one place."""
    rotary = base("llama").get_submodule("model.rotary_emb")
    tables = RotaryTables(rotary, [""], rounds=True)
    assert tables([-1]).isfinite().all()
    for positions in (
        [5, 6, 7],
        [6, 7, 8, 8, 9],
        [3, KEPT + 3, 4],
        [KEPT - 1, KEPT],
        [KEPT + 3, KEPT + 4],
        [3],
        [5, 6],
    ):
        expected = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([positions]))
        found = tables(positions)
        assert found.is_contiguous() and torch.equal(found[:, 0], torch.cat(expected).float())


def test_places_of_a_cache_are_those_of_its_buffers() -> None:
    """Also after it has grown, by either way."""
    cache = KVCache(2, 64)
    rows = torch.zeros(1, 1, 60, 8)

    def check(length: int) -> None:
        places = cache.places(1, 2, length)
        keys, values = cache.reserve(1, 0)
        assert places == [keys.data_ptr(), values.data_ptr(), keys.shape[2]] and places[2] >= length

    for layer in range(2):
        cache.update(rows, rows, layer)
    check(64)
    check(65)  # grows
    cache.update(torch.cat([rows] * 4, 2), torch.cat([rows] * 4, 2), 1)  # grows one layer
    check(70)
    check(400)
