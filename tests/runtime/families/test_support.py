"""`supports`: true or false, and one line that names what is missing, before an adapter is loaded or fitted."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig
from typer.testing import CliRunner

from runtime import AdapterError, ConfigError, UnsupportedModel, supports
from runtime.decoding.families.missing import missing_part
from runtime.exact.attention import block_attention
from tests.helpers.families import tiny
from train.cli.app import app

MUSIC = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"model_type": "musicgen_decoder"},
}
INSIDE = "its decoder of text (model_type '%s')"
# Model type, settings, and the part that is named.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v32", {}, "attention to keys that an index picks"),
    ("longcat_flash", {}, "several attentions in a layer"),
    ("bert", {}, "layers whose tokens see those after them"),
    ("openai-gpt", {}, "no cache of keys and values"),
    ("bloom", {}, "positions that are biases of attention"),
    ("trocr", {}, "it has cross-attention"),
    ("mamba", {}, "recurrent layers"),
    ("t5", {}, "an encoder beside the decoder"),
    ("paligemma", {}, "its decoder of text (model_type 'gemma') is inside a model of several kinds of input"),
    ("llava", {"text_config": {"model_type": "qwen3_next"}}, f"{INSIDE % 'qwen3_next'} has layers of the kind linear"),
    ("qwen3_5", {}, f"{INSIDE % 'qwen3_5_text'} has layers of the kind linear_attention"),
    ("qwen3_5_moe", {}, f"{INSIDE % 'qwen3_5_moe_text'} has layers of the kind linear_attention"),
    ("llama4", {}, f"{INSIDE % 'llama4_text'} has layers of the kind chunked_attention"),
    ("gemma3n_text", {}, "it has inputs of their own for each layer and layers that share keys"),
    ("blip-2", {}, "its decoder of text (model_type 'opt') is inside a model of several kinds of input"),
    ("emu3", {}, f"the layers of {INSIDE % 'emu3_text_model'} have not been described to SpecBound yet"),
    ("musicgen", MUSIC, "several decoders"),
    ("qwen3_next", {}, "layers of the kind linear_attention"),
    ("ctrl", {}, "the layers of this family have not been described to SpecBound yet"),
    ("falcon", {"alibi": True}, "positions that are biases of attention"),
    ("mpt", {"attn_config": {"alibi": True}}, "positions that are biases of attention"),
    ("dots3_note_text", {}, "keys that an index picks"),  # its config raises where layers differ in a setting
    ("mistral", {"per_layer_config": {"1": {"sliding_window": 8}}}, "settings that differ from layer to layer"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' rotary"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "upcast attention"),
]


@pytest.mark.parametrize(("model_type", "settings", "part"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_missing_is_named(model_type: str, settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    """By a config, by its folder, and by `specbound plan`: one line, exit code 1, nothing planned."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = AutoConfig.for_model(model_type, **settings)
    config.save_pretrained(tmp_path)
    for found in (supports(config), supports(tmp_path)):
        assert not found and part in found.reason and found.reason.endswith("plain decoding works")
        assert "\n" not in str(found) and repr(model_type) in str(found)
    planned = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--gpus", "1x80"])
    assert planned.exit_code == 1 and planned.stdout == ""
    assert planned.stderr.startswith("error: ") and part in planned.stderr and planned.stderr.count("\n") == 1


def test_a_supported_model_and_its_config() -> None:
    """Without weights and with them."""
    model = tiny("llama")
    assert supports(model) and supports(model.config)
    assert supports(model).supported and "'llama'" in str(supports(model))


def test_a_rotary_table_for_all_layers_beside_one_for_each_kind() -> None:
    """No layer of OLMo 3 reads the first, which is no reason to fail."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    try:
        config = AutoConfig.for_model("olmo3", rope_parameters=rope)
    except AttributeError:
        pytest.skip("this transformers cannot read such a config")
    assert "full_attention" in config.rope_parameters and supports(config)


def test_a_loaded_model_is_looked_at_as_it_is() -> None:
    """Its attention, and modules of others, are no matter of the config."""
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert not supports(model) and "lm_head has a hook; plain decoding works" in str(supports(model))
    assert "is no causal language model" in str(supports(tiny("llama").model))
    assert not supports(tiny("llama").train()) and supports(tiny("llama"))


@pytest.mark.parametrize(("family", "remedy"), [("gpt_oss", "eager"), ("llama", "sdpa")])
def test_attention_of_another_kind_names_one_that_the_family_has(family: str, remedy: str) -> None:
    """Not every class has sdpa; so do the parts, where they are driven all the same."""
    model = tiny(family)
    model.config._attn_implementation = "flash_attention_2"
    line = f"'flash_attention_2': load it with attn_implementation='{remedy}'; plain decoding works"
    assert not supports(model) and line in str(supports(model))
    with pytest.raises(UnsupportedModel, match=f"attn_implementation='{remedy}'"), block_attention(model, "rowwise"):
        pass


def test_a_setting_that_cannot_be_read_is_no_crash() -> None:
    """A config computes what it likes; its part is named, as layers have it."""

    class Odd:
        model_type = "odd"

        @property
        def index_topk(self) -> int:
            raise RuntimeError("of which layer?")

    assert missing_part(Odd(), inside=False) == "it has attention to keys that an index picks"


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    """And a config that cannot be read."""
    for wrong in (None, 3, ""):
        with pytest.raises(ConfigError, match="expected"):
            supports(wrong)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(AdapterError, match="could not be loaded"):
        supports(tmp_path)
