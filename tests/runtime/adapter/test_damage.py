"""Adapters changed at random, over 1,000: none loads silently different, runs code, or fails in a way of its own."""

import json
import pickle
import random
import sys
import warnings
from pathlib import Path

import pytest

from runtime import SpecBoundError, load_adapter, save_adapter
from runtime.adapter.config import SpecBoundConfig
from tests.helpers.mutations import CONFIG_MUTATORS, WEIGHT_MUTATORS, header_of, strange_value, vouched, with_header
from tests.helpers.publication import content

RUNS_CODE = {"exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}
RUNS_CODE |= {"marshal.loads", "socket.connect", "ctypes.dlopen"}
watched: list[str] | None = None


def watch(event, arguments):
    """Python's own account of what is run; a hook that is added stays, so it is switched by `watched`."""
    if watched is not None and event in RUNS_CODE:
        watched.append(event)


sys.addaudithook(watch)


class Bomb:
    """A pickle of it makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def original(tmp_path_factory, make_model, make_adapter):
    """Bytes of config and weights of a tiny adapter, and what decides what it does."""
    made = make_adapter(make_model(), draft_vocab_size=16, head_rank=2)
    folder = tmp_path_factory.mktemp("mutations") / "adapter"
    save_adapter(made, folder)
    return folder, (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()


def attempt(folder):
    """`refused`, `warned` or `loaded`, and what was loaded; anything else that is raised fails the test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = load_adapter(folder)
        except SpecBoundError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            return "refused", None
    return ("warned" if caught else "loaded"), found


@pytest.mark.parametrize(
    ("name", "mutators", "number", "least_refused"),
    [("config.json", CONFIG_MUTATORS, 700, 500), ("model.safetensors", WEIGHT_MUTATORS, 500, 490)],
)
def test_a_mutated_adapter_never_loads_silently_different(original, name, mutators, number, least_refused):
    """Refused, or loaded with a warning, or the same as before; and no code runs."""
    global watched
    folder, config, weights = original
    good, data = content(load_adapter(folder)), {"config.json": config, "model.safetensors": weights}[name]
    numbers, outcomes = random.Random(7), {"refused": 0, "warned": 0, "loaded": 0}
    for index in range(number):
        (folder / name).write_bytes(mutators[index % len(mutators)](data, numbers))
        watched = []
        outcome, found = attempt(folder)
        ran, watched = watched, None
        assert not ran, (index, ran)
        outcomes[outcome] += 1
        assert outcome != "loaded" or content(found) == good, index
    (folder / name).write_bytes(data)
    assert outcomes["refused"] >= least_refused and content(load_adapter(folder)) == good, outcomes


def test_one_whose_hashes_fit_is_refused_or_as_valid_as_any(original):
    """By a writer who means harm, so nothing tells it from a good one: what loads has passed every check."""
    global watched
    folder, config, weights = original
    numbers, loaded = random.Random(8), 0
    for index in range(400):
        if index % 2:
            (folder / "config.json").write_bytes(vouched(folder, strange_value(config, numbers)))
        else:
            (folder / "model.safetensors").write_bytes(WEIGHT_MUTATORS[index // 2 % 6](weights, numbers))
            (folder / "config.json").write_bytes(vouched(folder, config))
        watched = []
        outcome, found = attempt(folder)
        ran, watched = watched, None
        assert not ran, (index, ran)
        if found is not None:
            loaded += 1
            assert outcome == "warned" or SpecBoundConfig.from_json(found.config.to_json(), source="") == found.config
            assert all(bool(tensor.isfinite().all()) for tensor in found.heads.state_dict().values())
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(weights)
    assert 20 < loaded < 200


def test_pickles_and_archives_in_the_place_of_a_file(original, tmp_path):
    """Refused and never opened; code that lies beside the files is never run."""
    folder, config, weights = original
    bomb = pickle.dumps(Bomb(tmp_path / "opened"))
    header, body = header_of(weights)
    for data in (bomb, b"PK\x03\x04" + bomb, with_header(json.dumps(header).encode(), bomb + body[len(bomb) :])):
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(data)
            assert attempt(folder)[0] == "refused"
            (folder / "config.json").write_bytes(config)
            (folder / "model.safetensors").write_bytes(weights)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')")
    (folder / "__init__.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')")
    assert attempt(folder)[0] == "loaded"
    assert not (tmp_path / "opened").exists()


def test_the_watch_sees_what_it_is_there_for(tmp_path):
    """Negative control: a pickle and an `eval` are seen."""
    global watched
    watched = []
    pickle.loads(pickle.dumps(Bomb(tmp_path / "opened")))
    eval("1 + 1")
    seen, watched = watched, None
    assert {"pickle.find_class", "compile", "exec"} <= set(seen)
