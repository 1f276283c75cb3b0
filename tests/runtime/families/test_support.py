"""`supports`: true or false, and one line that names what is missing, before an adapter is loaded or fitted."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from runtime import AdapterError, ConfigError, supports
from tests.helpers.families import tiny
from train.cli.app import app

MUSIC = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"model_type": "musicgen_decoder"},
}
# Model type, settings, and the part that is named.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {}, "latent attention"),
    ("mamba", {}, "recurrent layers"),
    ("t5", {}, "an encoder beside the decoder"),
    ("paligemma", {}, "its decoder of text (model_type 'gemma') is inside"),
    ("llava", {"text_config": {"model_type": "qwen3_next"}}, "decoder of text (model_type 'qwen3_next') is inside"),
    ("musicgen", MUSIC, "several decoders"),
    ("qwen3_next", {}, "layers of the kind linear_attention"),
    ("opt", {}, "its layers are not known here"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' rotary"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "upcast attention"),
]


@pytest.mark.parametrize(("model_type", "settings", "part"), REFUSED, ids=[model_type for model_type, *_ in REFUSED])
def test_what_is_missing_is_named(model_type: str, settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    """By a config, by its folder, and by `specbound plan`: one line, exit code 1, nothing planned."""
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


def test_a_loaded_model_is_looked_at_as_it_is() -> None:
    """Its attention, and modules of others, are no matter of the config."""
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert not supports(model) and "lm_head has a hook; plain decoding works" in str(supports(model))
    assert "is no causal language model" in str(supports(tiny("llama").model))
    assert not supports(tiny("llama").train()) and supports(tiny("llama"))


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    """And a config that cannot be read."""
    for wrong in (None, 3, ""):
        with pytest.raises(ConfigError, match="expected"):
            supports(wrong)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(AdapterError, match="could not be loaded"):
        supports(tmp_path)
