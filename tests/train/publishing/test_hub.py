"""The whole way through a Hub on the loopback: fit, publish, forget, load by name, same ids; and a Hub that fails."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import constants

from runtime import AdapterError, load_adapter, load_specbound, save_adapter
from runtime.adapter.hub import resolve_adapter
from tests.helpers.hub.server import TOKEN
from tests.helpers.paths import ROOT
from train.publishing.contents import write_custom_generate

BASE, NAME = "some-org/tiny-base", "some-org/tiny-specbound"

# In a process of its own, as a user's: plain decoding, then the adapter by its name, then the form transformers calls,
# then what the documentation says.
USE = """
import json, pathlib, re, sys, torch
from transformers import AutoModelForCausalLM
from runtime import load_specbound
base, name, page = sys.argv[1:]
ids = torch.tensor([[5, 17, 33, 8, 5, 17, 60]])
greedy = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
torch.set_num_threads(1)
plain = AutoModelForCausalLM.from_pretrained(base)
expected = plain.generate(**greedy).tolist()
by_name = load_specbound(name)
cached = load_specbound(name, local_files_only=True)
called = plain.generate(**greedy, custom_generate=name, trust_remote_code=True).tolist()
names = {"load_specbound": load_specbound, "my_model": AutoModelForCausalLM.from_pretrained(base), "inputs": greedy}
for block in re.findall("```python\\n(.*?)```", pathlib.Path(page).read_text(), re.S):
    exec(block.replace("ORG/NAME", name), names)
print(json.dumps({
    "expected": expected, "by_name": by_name.generate(**greedy).tolist(), "cached": cached.generate(**greedy).tolist(),
    "custom_generate": called, "documented": names["output"].tolist(),
    "emitted": [m.specbound.stats.emitted for m in (by_name, cached, plain)],
    "revision": by_name.specbound.config.base_model_revision,
}))
"""


def environment(hub, home):
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return inherited | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def run(hub, home, *command):
    done = subprocess.run(
        [sys.executable, *command], env=environment(hub, home), cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_fit_publish_forget_load_and_the_ids_are_plain_decodings(hub, make_recipe, tiny_base, tmp_path):
    commit = hub.put(BASE, {path.name: path.read_bytes() for path in tiny_base.iterdir()})
    settings = {"model_name_or_path": BASE, "license": "apache-2.0", "push_to_hub": True, "hub_model_id": NAME}
    recipe = make_recipe(tmp_path / "out", corpus_dir=None, **settings)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(hub, tmp_path, ROOT / "train" / "fit_exits.py", "--config", "recipe.yaml")
    files = hub.files(NAME)
    assert hub.repositories[NAME].private and files["model.safetensors"]
    for private in (TOKEN.encode(), str(tmp_path).encode(), b"/tmp/", b"recipe.yaml"):
        assert not [name for name, content in files.items() if private in content]
    assert files["model.safetensors"] == (tmp_path / "out" / "adapter" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")

    hub.repositories[NAME].tags["v1.0"] = hub.repositories[NAME].branches["main"]
    found = json.loads(run(hub, tmp_path, "-c", USE, BASE, NAME, ROOT / "docs" / "hub.md").stdout.splitlines()[-1])
    for way in ("by_name", "cached", "custom_generate", "documented"):
        assert found[way] == found["expected"], way
    assert all(found["emitted"]) and found["revision"] == commit
    assert "GET /some-org/tiny-specbound/resolve/" in "\n".join(hub.log)


IDS = torch.tensor([[5, 17, 33, 8]])


@pytest.fixture
def there(hub, make_model, make_adapter, tmp_path):
    """An adapter that is on the Hub; returns its folder here."""
    save_adapter(make_adapter(make_model()), tmp_path / "adapter", extra=write_custom_generate)
    folder = tmp_path / "adapter"
    names = (path for path in folder.rglob("*") if path.is_file())
    hub.put(NAME, {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}, private=True)
    return folder


def test_what_was_loaded_once_needs_no_hub(hub, there, make_model, tmp_path, monkeypatch):
    model = make_model()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(IDS, **options)
    with pytest.raises(AdapterError, match="the Hub could not give it"):
        load_specbound(NAME, model, cache_dir=tmp_path / "cache", local_files_only=True)
    assert hub.log == []
    first = resolve_adapter(NAME, cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in first.rglob("*.*") if path.is_file()) == ["config.json", "model.safetensors"]
    sent = len(hub.log)
    load_specbound(NAME, model, cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(model.generate(IDS, **options), plain) and len(hub.log) == sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_adapter(NAME, cache_dir=tmp_path / "cache") == first and len(hub.log) == sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.hard = (1, 503)
    assert resolve_adapter(NAME, cache_dir=tmp_path / "cache") == first


def test_revisions_are_branches_tags_and_commits(hub, there, tmp_path):
    first = hub.repositories[NAME].branches["main"]
    hub.repositories[NAME].tags["v1"] = first
    newer = hub.put(NAME, hub.files(NAME) | {"config.json": b"{}"})
    for revision in ("v1", first):
        assert load_adapter(resolve_adapter(NAME, revision=revision, cache_dir=tmp_path / "cache"))
    for revision in (None, "main", newer):
        with pytest.raises(AdapterError, match="not of a SpecBound adapter"):
            load_adapter(resolve_adapter(NAME, revision=revision, cache_dir=tmp_path / "cache"))
    with pytest.raises(AdapterError, match="could not give it"):
        resolve_adapter(NAME, revision="v2", cache_dir=tmp_path / "cache")


def test_private_and_absent_repositories(hub, there, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    for name in (NAME, "some-org/absent"):
        with pytest.raises(AdapterError) as caught:
            resolve_adapter(name, cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert resolve_adapter(NAME, token=TOKEN, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("fault", ["503", "429", "drop", "lost"])
def test_a_fault_at_each_request_of_a_download_leaves_a_whole_adapter_or_none(hub, there, tmp_path, fault):
    resolve_adapter(NAME, cache_dir=tmp_path / "whole")
    requests, good = len(hub.log), load_adapter(there).config
    assert requests >= 6
    failed = 0
    for number in range(1, requests + 1):
        hub.log.clear()
        hub.faults = {number: fault}
        cache = tmp_path / f"cache-{number}"
        try:
            found = resolve_adapter(NAME, cache_dir=cache)
        except AdapterError as error:
            assert "\n" not in str(error) and "could not give it" in str(error)
            failed += 1
            hub.faults = {}
            found = resolve_adapter(NAME, cache_dir=cache)
        assert load_adapter(found).config == good
    assert failed < requests
