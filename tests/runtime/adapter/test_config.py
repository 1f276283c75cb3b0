"""config.json: the round trip, every wrong value in one line, no byte that changes its meaning silently."""

import dataclasses
import json
import random
import warnings

import pytest

from runtime import AdapterError, ConfigError, SpecBoundConfig, SpeculationBounds, TemperatureSchedule
from runtime.adapter.config import CONTENT_SHA256

DIGEST = "0123456789abcdef" * 4


def make(**changes):
    fields = {
        "base_model_name_or_path": "org/base",
        "base_model_revision": "f" * 40,
        "base_model_fingerprint": "sha256:" + DIGEST,
        "tokenizer_fingerprint": "sha256:" + DIGEST[::-1],
        "num_hidden_layers": 12,
        "hidden_size": 64,
        "vocab_size": 1000,
        "exit_layers": (3, 6),
        "head": "deep",
        "head_rank": 16,
        "draft_vocab_size": 100,
        "temperatures": TemperatureSchedule.linear(0.37, [3, 6], 12),
        "bounds": SpeculationBounds(0.62, 6, 5),
        "weights_sha256": DIGEST,
        "license": "mit",
    }
    return SpecBoundConfig(**fields | changes)


def read(text):
    return SpecBoundConfig.from_json(text, source="FOLDER/config.json")


def altered(**changes):
    """Text of a good config with some top-level values replaced, hash and all."""
    fields = json.loads(make().to_json()) | changes
    return json.dumps(fields)


def refusal(text):
    with warnings.catch_warnings(), pytest.raises(AdapterError) as caught:
        warnings.simplefilter("ignore", UserWarning)
        read(text)
    message = str(caught.value)
    assert "FOLDER/config.json" in message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"license": None, "base_model_revision": None},
        {"base_model_name_or_path": 'a folder/with "quotes" [and] \u00e9'},
        {"draft_vocab_size": 1000},
        {"temperatures": TemperatureSchedule("fitted", {3: 0.1 + 0.2, 6: 1e-9})},
        {"temperatures": TemperatureSchedule.none([3, 6]), "bounds": SpeculationBounds(1.5, 1, 0)},
    ],
)
def test_round_trip(changes):
    config = make(**changes)
    assert read(config.to_json()) == config
    assert json.loads(config.to_json()).keys().isdisjoint({"model_type", "auto_map", "architectures"})


def test_the_same_content_in_another_layout_is_the_same_config():
    fields = json.loads(make().to_json())
    assert read(json.dumps(dict(reversed(fields.items())), separators=(",", ":"))) == make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "holds list"),
        ("null", "holds NoneType"),
        ("{}", "'format' is None"),
        ('{"format": true}', "'format' is True"),
        ('{"format": "1"}', "'format' is '1'"),
        ('{"format": 0}', "'format' is 0"),
        ('{"format": 1, "format": 1}', "a key appears twice"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "not valid JSON"),
        ("[" * 10_000 + "]" * 10_000, "not valid JSON"),
        ('{"format": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"format": ' + "1" * 4000 + "}", "this version reads 1"),
        (" " * 1_000_001, "at most 1000000"),
        ('{"model_type": "llama"}', "not of a SpecBound adapter"),
    ],
)
def test_what_is_no_adapter_config(text, expected):
    assert expected in refusal(text)


def test_a_newer_format_names_the_version_to_install():
    assert refusal(altered(format=2, specbound_version="7.1.0")).endswith("install specbound >= 7.1.0")
    assert refusal(altered(format=2, specbound_version=["\n"])).endswith("install a newer specbound")
    assert refusal('{"format": 2}').endswith("install a newer specbound")


@pytest.mark.parametrize("key", sorted(json.loads(make().to_json())))
def test_a_missing_key_is_named(key):
    fields = json.loads(make().to_json())
    del fields[key]
    assert key in refusal(json.dumps(fields))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", True, "hidden_size is True: expected int"),
        ("hidden_size", 64.0, "hidden_size is 64.0"),
        ("hidden_size", "64", "hidden_size is '64'"),
        ("hidden_size", 0, "from 1 to 10000000"),
        ("hidden_size", 10**9, "from 1 to 10000000"),
        ("head_rank", 10**4000, "head_rank"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("vocab_size", 99, "draft_vocab_size is 100: expected at most vocab_size, 99"),
        ("num_hidden_layers", 6, "from 1 to 5"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("specbound_version", 3, "specbound_version is 3"),
        ("specbound_version", "", "specbound_version is ''"),
        ("exit_layers", [], "exit_layers"),
        ("exit_layers", [6, 3], "ascending"),
        ("exit_layers", [3, 3], "ascending"),
        ("exit_layers", [0, 3], "from 1 to 11"),
        ("exit_layers", [3, 12], "from 1 to 11"),
        ("exit_layers", [3, True], "exit_layers is True"),
        ("exit_layers", {"3": 6}, "expected list"),
        ("exit_layers", [3, 7], "exit temperatures are for layers"),
        ("head", "magic", "expected one of attention, deep, linear, lora"),
        ("head", [[[[[[[[]]]]]]]], "head is"),
        ("head", None, "expected str"),
        ("base_model_name_or_path", "", "printable"),
        ("base_model_name_or_path", "a\x1b[31mb", "printable"),
        ("base_model_name_or_path", "a\nb", "printable"),
        ("base_model_name_or_path", "\ud800", "printable"),
        ("base_model_name_or_path", "x" * 501, "printable"),
        ("license", 3, "license is 3"),
        ("base_model_fingerprint", "sha256:" + DIGEST[1:], "64 hexadecimal"),
        ("tokenizer_fingerprint", DIGEST, "64 hexadecimal"),
        ("weights_sha256", "", "64 hexadecimal"),
        ("bounds", None, "bounds is None"),
        ("bounds", {"exit_threshold": 0.5}, "expected an object with the keys"),
        ("temperatures", [], "temperatures is"),
    ],
)
def test_a_wrong_value_is_named(key, value, expected):
    assert expected in refusal(altered(**{key: value}))


@pytest.mark.parametrize(
    ("key", "name", "value", "expected"),
    [
        ("bounds", "exit_threshold", float("nan"), "NaN is not a number"),
        ("bounds", "exit_threshold", float("inf"), "Infinity is not a number"),
        ("bounds", "exit_threshold", -0.1, "at least 0"),
        ("bounds", "exit_threshold", True, "bounds.exit_threshold is True"),
        ("bounds", "exit_threshold", 10**400, "expected a smaller number"),
        ("bounds", "max_exit_layer", -1, "max_exit_layer is -1"),
        ("bounds", "max_exit_layer", 2.0, "expected int"),
        ("bounds", "max_draft_tokens", -1, "max_draft_tokens is -1"),
        ("bounds", "min_draft_survival", 1.5, "min_draft_survival is 1.5"),
        ("temperatures", "kind", "annealed", "annealed"),
        ("temperatures", "alpha", "x", "temperatures.alpha is 'x'"),
        ("temperatures", "alpha", 10**400, "expected a smaller number"),
        ("temperatures", "temperatures", {"3": 1.0}, "for layers [3]"),
        ("temperatures", "temperatures", {"3": 1.0, "6": -1.0}, "layer 6 is -1.0"),
        ("temperatures", "temperatures", {"3": 1.0, "6": 0}, "layer 6 is 0.0"),
        ("temperatures", "temperatures", {"3": 1.0, "6": None}, "temperatures.6 is None"),
        ("temperatures", "temperatures", {"3": 1.0, "6": 10**400}, "expected a smaller number"),
        ("temperatures", "temperatures", {"3": 1.0, "06": 1.0}, "expected layer numbers"),
        ("temperatures", "temperatures", {"3": 1.0, "\u0666": 1.0}, "expected layer numbers"),
        ("temperatures", "temperatures", {"3": 1.0, "9" * 5000: 1.0}, "expected layer numbers"),
    ],
)
def test_a_wrong_value_within_is_named(key, name, value, expected):
    inner = json.loads(make().to_json())[key] | {name: value}
    assert expected in refusal(altered(**{key: inner}))


def test_a_number_that_overflows_is_refused():
    assert "not a number" in refusal(make().to_json().replace("0.62", "1e999"))


def test_an_unknown_key_nested_as_deep_as_json_allows():
    for depth in range(100, 2000, 50):
        text = make().to_json().rstrip("}\n") + ', "x": ' + "[" * depth + "]" * depth + "}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                assert read(text) == make()
            except AdapterError as error:
                assert "recursion" in str(error)


def test_one_that_cannot_be_written_cannot_be_made():
    for bounds in (SpeculationBounds(float("inf"), 6, 5),):
        with pytest.raises(ConfigError, match="exit_threshold is inf"):
            make(bounds=bounds)
    with pytest.raises(ConfigError, match="alpha is nan"):
        make(temperatures=TemperatureSchedule("linear", {3: 1.0, 6: 1.0}, float("nan")))


def test_an_unknown_key_and_a_change_by_hand_warn():
    with pytest.warns(UserWarning) as caught:
        assert read(altered(colour="red")) == make()
    assert "unknown keys ['colour'] are ignored" in str(caught[0].message)
    bounds = {"exit_threshold": 0.7, "max_exit_layer": 6, "max_draft_tokens": 5}
    with pytest.warns(UserWarning, match="changed after it was written"):
        assert read(altered(bounds=bounds)) == dataclasses.replace(make(), bounds=SpeculationBounds(**bounds))


def test_a_flipped_byte_is_never_a_silently_different_config():
    config, generator = make(), random.Random(0)
    good = config.to_json().encode()
    outcomes = {"refused": 0, "warned": 0, "same": 0}
    for _ in range(200):
        bad = bytearray(good)
        bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = read(bad.decode())
            except (AdapterError, UnicodeDecodeError):
                outcomes["refused"] += 1
                continue
        assert caught or found == config
        outcomes["warned" if caught else "same"] += 1
    assert outcomes["refused"] > 50 and outcomes["warned"] > 20
    assert CONTENT_SHA256 in json.loads(good)
