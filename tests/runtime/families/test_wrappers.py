"""Decoders of text inside models of several kinds of input: ids are stock's after text, and after pictures."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime import SpeculationBounds, detach, load_specbound, supports
from runtime.adapter.folder import save_adapter
from runtime.adapter.identity import base_fingerprint
from runtime.batch import Batch, generated, generation
from runtime.decoding.cache import KVCache
from runtime.decoding.families import check
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.wrappers import WRAPPERS
from runtime.exact.attention import block_attention
from runtime.exact.execution import ExecutionPolicy
from runtime.exact.probe import compare
from runtime.exact.reference import Reference
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers import cells
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import NATIVE_SHAPE, VOCABULARY, prompt
from tests.helpers.pictures.wrappers import IMAGE, PICTURES, TINY, picture, wrapper

NEW = 24
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
TREES, CHAINS = SpeculationBounds(0.2, 1, 6, max_branches=3, max_depth=4), SpeculationBounds(0.2, 1, 4)


def test_every_wrapper_is_tried() -> None:
    """Those that are accepted have a tiny model here, and a picture."""
    assert set(TINY) == set(WRAPPERS) == set(PICTURES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(TINY))
def test_ids_are_stock_s(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of text, greedy in float32 and sampled in bfloat16, and of a prompt with a picture, the other way round."""
    model, how = wrapper(name, dtype), [cells.GREEDY, cells.SAMPLED]
    assert supports(model) and supports(model.config)
    text, seen = how if dtype == torch.float32 else reversed(how)
    cells.check(model, [(7, text), (picture(name, dtype), seen)], monkeypatch)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen2_5_vl", "smolvlm"])
@torch.inference_mode()
def test_a_picture_s_token_in_the_answer_is_one_as_others(name: str) -> None:
    """Without a picture: every bit of the logits."""
    model, tokens = wrapper(name), [5, IMAGE, 7, IMAGE]
    layers, ids = DecoderLayers(model), torch.tensor([tokens])
    with block_attention(model, "batched"):
        block = layers.embed(ids, 0), 0, layers.num_layers, 0, KVCache(layers.num_layers, 4)
        top = layers.run(*block, tokens=tokens)
    assert torch.equal(layers.logits(top), model(ids).logits)


@pytest.mark.parametrize("name", sorted(PICTURES))
@torch.inference_mode()
def test_another_picture_shows(name: str) -> None:
    """Negative control: what the tests above compare depends on the picture."""
    model, given = wrapper(name), picture(name, torch.float32)
    other = given | {"pixel_values": -3 * given["pixel_values"]}
    assert not torch.equal(model(**given).logits[:, -1], model(**other).logits[:, -1])


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl"])
def test_prompts_with_other_pictures_are_other_prompts(name: str) -> None:
    """Of the same ids, in one batch: what was read with one picture is not taken for another, or for none."""
    model, given = wrapper(name), picture(name, torch.float32)
    prompts = [given, given | {"pixel_values": -3 * given["pixel_values"]}, {"input_ids": given["input_ids"]}]
    stock = [model.generate(**each, **GREEDY)[0].tolist() for each in prompts]
    assert stock[0] != stock[1]
    attach(model, SpecBound(model, FakeHeads("mixed", [1], stock[0], VOCABULARY), TREES))
    found = []
    with Batch(model, 1) as batch:
        for each in prompts:
            call = batch.add(**each, **GREEDY)
            while not call.ended:
                batch.round()
            found.append(each["input_ids"][0].tolist() + generated(call))
    detach(model)
    assert found == stock


@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl"])
def test_layers_of_the_llama_kind_run_natively_inside(name: str) -> None:
    """At sizes that our kernels take; turned along three axes that are equal, and along one."""
    sections = {"mrope_section": [12, 10, 10]} if name == "qwen3_vl" else {}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | sections}
    model = wrapper(name, torch.bfloat16, **NATIVE_SHAPE | rope)
    stock = model.generate(prompt(), **GREEDY)
    attach(model, SpecBound(model, FakeHeads("mixed", [1], stock[0].tolist(), VOCABULARY), TREES))
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    policy = model.specbound.certificate.policy
    if not policy.attention.startswith("native"):
        pytest.skip("no native kernels here, or torch adds in an order of its own")
    assert policy.native


def test_a_second_call_probes_nothing_anew() -> None:
    """What a wrapper keeps of one prompt's pictures is no change of the model, and text after it counts from 0."""
    model = wrapper("qwen2_5_vl")
    stock = model.generate(prompt(), **GREEDY)
    attach(model, SpecBound(model, FakeHeads("mixed", [1], stock[0].tolist(), VOCABULARY), CHAINS))
    model.generate(**picture("qwen2_5_vl", torch.float32), **GREEDY)
    first = model.specbound.certificate
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    assert model.specbound.certificate is first and model.specbound.stats.accepted.total() > 3


def test_positions_go_on_where_those_of_the_picture_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: counted by tokens they are others, and so are ids."""
    model, given = wrapper("qwen3_vl"), picture("qwen3_vl", torch.float32)
    stock = model.generate(**given, **GREEDY)
    attach(model, SpecBound(model, FakeHeads("right", [1], stock[0].tolist(), VOCABULARY), CHAINS))
    assert torch.equal(model.generate(**given, **GREEDY), stock)
    monkeypatch.setattr(generation, "position_after", lambda positions: positions.shape[-1])
    assert not torch.equal(model.generate(**given, **GREEDY), stock)


def test_a_prompt_that_ends_in_a_picture_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    """The next position is not one number; said once."""
    model, given = wrapper("qwen3_vl"), picture("qwen3_vl", torch.float32, words=0)
    stock = model.generate(**given, **GREEDY)
    attach(model, SpecBound(model, FakeHeads("right", [1], stock[0].tolist(), VOCABULARY), CHAINS))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(**given, **GREEDY), stock)
        assert torch.equal(model.generate(**given, **GREEDY), stock)
    assert caplog.text.count("ends inside an image") == 1 and not model.specbound.stats.drafted.total()


@pytest.mark.parametrize("name", ["cohere2_vision", "gemma3"])
def test_logits_scaled_or_capped_as_the_decoder_s_own_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: its config says so, and the wrapper does not do it."""
    model = wrapper(name)
    reference = Reference.near(model)
    assert compare(model, reference, ExecutionPolicy.rowwise(), [2]).differing == 0
    monkeypatch.setattr(check, "replace", lambda family, body, **_: replace(family, body=body))
    assert compare(model, reference, ExecutionPolicy.rowwise(), [2]).differing > 0


def test_an_adapter_of_the_text_model_loads_on_the_wrapper(
    tmp_path: Path, make_adapter: Any, make_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The base is the decoder of text: its fingerprint is the same on its own and inside; by folder and by object."""
    model, tokenizer = wrapper("gemma3"), make_tokenizer(VOCABULARY)
    alone = AutoModelForCausalLM.from_config(model.config.text_config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    assert base_fingerprint(alone) == base_fingerprint(model) != base_fingerprint(wrapper("llava"))
    adapter = make_adapter(alone, tokenizer, exit_layers=(1,))
    save_adapter(adapter, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    stock = model.generate(prompt(), **GREEDY)
    for base in (model, tmp_path / "base"):
        with caplog.at_level(logging.WARNING):
            loaded = load_specbound(tmp_path / "adapter", base, adaptive=False)
        assert "other weights" not in caplog.text and type(loaded).__name__ == "Gemma3ForConditionalGeneration"
        assert torch.equal(loaded.generate(prompt(), **GREEDY), stock) and loaded.specbound.stats.drafted.total()
    with torch.no_grad():
        detach(model).model.language_model.layers[0].mlp.up_proj.weight.mul_(1.1)
    assert base_fingerprint(model) != base_fingerprint(alone)
