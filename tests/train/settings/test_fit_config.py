"""The recipe and the flags: precedence, types, misspelt names, ranges."""

import dataclasses
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from tests.helpers.paths import ROOT
from train.settings.fit_config import FitConfig, parse_config, validate, validate_against_model

REQUIRED = [
    "--model_name_or_path",
    "base",
    "--prompts",
    "p.jsonl",
    "--exit_layers",
    "4",
    "8",
    "--output_dir",
    "out",
]
RECIPE = """\
model_name_or_path: base
prompts: [a.jsonl, some/set:test]
exit_layers: [4, 8]
output_dir: out
"""


def recipe(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "fit.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def config(**changes) -> FitConfig:
    return dataclasses.replace(parse_config(REQUIRED), **changes)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    argv = recipe(tmp_path, RECIPE + "learning_rate: 1e-4\nweight_decay: '2e-2'\nnum_train_epochs: 2\nseed: 3\n")
    parsed = parse_config([*argv, "--seed=5", "--max-steps", "-1", "--exit_layers", "2", "6"])
    assert (parsed.learning_rate, parsed.weight_decay, parsed.num_train_epochs) == (1e-4, 2e-2, 2.0)
    assert isinstance(parsed.num_train_epochs, float)
    assert (parsed.seed, parsed.exit_layers, parsed.prompts) == (5, [2, 6], ["a.jsonl", "some/set:test"])
    assert parsed.kl_weight == 0.5
    origins = ("seed", "max_steps", "exit_layers", "learning_rate", "prompts", "kl_weight")
    assert [parsed.sources[name] for name in origins] == ["flag", "flag", "flag", "file", "file", "default"]
    assert set(parsed.sources) == {entry.name for entry in dataclasses.fields(FitConfig) if entry.init}
    validate(parsed)


def test_flags_alone_are_enough():
    parsed = parse_config(REQUIRED)
    assert parsed.prompts == ["p.jsonl"] and parsed.corpus_path == Path("out/corpus")
    assert config(corpus_dir="c").corpus_path == Path("c")
    validate(parsed)


def test_null_empty_list_and_byte_order_mark(tmp_path):
    argv = recipe(tmp_path, "\ufeff" + RECIPE + "max_exit_layer:\nevaluation_files: []\nreport_to: [none]\n")
    parsed = parse_config(argv)
    assert parsed.max_exit_layer is None and parsed.evaluation_files == [] and parsed.report_to == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rat: 1e-4", "unknown setting learning_rat (did you mean learning_rate?)"),
        ("sources: {}", "unknown setting sources"),
        ("learning_rate: fast", "learning_rate: expected float, got 'fast' (str)"),
        ("seed: 1.5", "seed: expected int, got 1.5 (float)"),
        ("seed: true", "seed: expected int, got True (bool)"),
        ("seed: [1]", "seed: expected int, got [1] (list)"),
        ("seed:", "seed: expected int, got None"),
        ("model_revision: 1234567", "model_revision: expected str, got 1234567 (int); put it in quotes"),
        ("report_to: tensorboard", "report_to: expected a list, such as ['tensorboard']"),
        ("exit_layers: [4, x]", "line 5: exit_layers is given twice"),
        ("evaluation_files: [a, 3]", "evaluation_files: expected str, got 3"),
        ("seed: [", "line 6: not valid YAML"),
        ("license: 2020-99-99", "not valid YAML"),
        ("license: !!python/object/apply:os.getcwd []", "line 5: not valid YAML"),
    ],
)
def test_a_wrong_line_names_key_value_and_type(tmp_path, line, expected):
    argv = recipe(tmp_path, RECIPE + line + "\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    assert expected in str(caught.value) and argv[1] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "3\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match=r"expected lines `setting: value`"):
        parse_config(recipe(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read"):
            parse_config(["--config", str(path)])
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"not valid YAML"):
        parse_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rat", "1"], "unknown setting --learning_rat (did you mean learning_rate?)"),
        (["--learning_rat=1"], "did you mean learning_rate?"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--seed"], "expected one argument"),
        (["--config"], "expected one argument"),
        (["--sources", "x"], "unknown setting --sources"),
    ],
)
def test_wrong_flags(argv, expected):
    with pytest.raises(ConfigError) as caught:
        parse_config([*REQUIRED, *argv])
    assert expected in str(caught.value)


def test_a_recipe_without_its_flag_and_missing_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"'fit.yaml' belongs to no flag.*--config FILE"):
        parse_config(["fit.yaml", *REQUIRED])
    with pytest.raises(ConfigError, match=r"'fit.yaml' belongs to no flag.*--config FILE"):
        parse_config(["fit.yaml"])
    with pytest.raises(ConfigError, match=r"required: .*--output_dir"):
        parse_config(recipe(tmp_path, RECIPE.replace("output_dir: out\n", "")))
    with pytest.raises(ConfigError, match=r"required: .*--prompts"):
        parse_config(recipe(tmp_path, ""))


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{entry.name} " in text for entry in dataclasses.fields(FitConfig) if entry.init)
    assert "--config" in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("head", "linaer", "did you mean linear?"),
        ("dtype", "int8", "one of float32, bfloat16, float16"),
        ("features", "x", "one of online, cache"),
        ("schedule", "linaer", "did you mean linear?"),
        ("chat_template", "chatml", "one of auto, none"),
        ("max_new_tokens", 0, "above 0"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("learning_rate", -1.0, "above 0"),
        ("learning_rate", 1e38, "at most 1"),
        ("learning_rate", 3.0, "at most 1"),
        ("max_steps", 0, "-1 or above 0"),
        ("max_steps", -2, "-1 or above 0"),
        ("sample_fraction", 1.1, "from 0 to 1"),
        ("exit_threshold", -0.1, "from 0 to 1"),
        ("top_p", 1.5, "at most 1"),
        ("kl_weight", -1.0, "at least 0"),
        ("draft_vocab_size", -1, "at least 0"),
        ("held_out_fraction", 0.95, "a sum below 1"),
        ("exit_layers", [], "from 1 on"),
        ("exit_layers", [0, 4], "from 1 on"),
        ("exit_layers", [4, 4], "each once"),
        ("exit_layers", [8, 4], "rising"),
        ("max_exit_layer", 3, "at least 4"),
        ("max_draft_tokens", 0, "above 0"),
        ("prompts", [], "not empty"),
        ("output_dir", "", "not empty"),
    ],
)
def test_values_out_of_range(name, value, expected):
    with pytest.raises(ConfigError) as caught:
        validate(config(**{name: value}))
    assert name in str(caught.value) and expected in str(caught.value)


def test_values_at_the_edge_of_their_range():
    validate(config(draft_vocab_size=0, weight_decay=0.0, kl_weight=0.0, calibration_fraction=0.0, exit_threshold=1.0))


def test_against_the_model():
    model = {"num_hidden_layers": 9, "vocab_size": 8192}
    validate_against_model(config(), **model)
    with pytest.raises(ConfigError, match=r"exit_layers: expected layers in 1 to 7 .*got \[4, 8\]"):
        validate_against_model(config(), num_hidden_layers=8, vocab_size=8192)
    with pytest.raises(ConfigError, match=r"max_exit_layer: expected at most 8; got 9"):
        validate_against_model(config(max_exit_layer=9), **model)
    with pytest.raises(ConfigError, match=r"draft_vocab_size"):
        validate_against_model(config(draft_vocab_size=8193), **model)
    with pytest.raises(ConfigError, match=r"teacher_top_k"):
        validate_against_model(config(draft_vocab_size=0), num_hidden_layers=9, vocab_size=16)


def test_no_answer_is_cut_unless_a_length_is_given():
    assert config().longest == config().max_prompt_tokens + config().max_new_tokens
    assert config(max_new_tokens=512, max_prompt_tokens=100).longest == 612
    assert config(max_length=300).longest == 300


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "fit").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_cut_no_answer(path):
    parsed = parse_config(["--config", str(path)])
    validate(parsed)
    assert parsed.longest >= parsed.max_prompt_tokens + parsed.max_new_tokens
