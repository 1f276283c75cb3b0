"""Publishing against a Hub on the loopback: one commit, none where nothing changed, nothing of others overwritten."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from runtime import AdapterError, BaseModelMismatch, ConfigError, load_adapter, save_adapter
from tests.helpers.publication import BASE, NAME, hashes, refusal, rename
from train.cli.app import app
from train.fit_exits import main as fit
from train.publishing.assembly import write_card
from train.publishing.publish import publish
from train.publishing.staging import Claims
from train.publishing.tune import tune_adapter
from train.replay.costs import CostTable
from train.replay.search import Held
from train.settings.fit_config import FitConfig

# huggingface_hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def test_one_private_commit_holds_all_and_nothing_else(hub, folder):
    (folder / "pytorch_model.bin").write_bytes(b"not ours")
    before = hashes(folder)
    found = publish(folder, NAME, tag="v1")
    assert found.changed and found.url == f"{hub.url}/{NAME}"
    repository = hub.repositories[NAME]
    assert repository.private and repository.tags == {"v1": found.commit} and len(repository.commits) == 2
    files = hub.files(NAME)
    files.pop(".gitattributes")
    assert sorted(files) == [
        "README.md", "calibration.json", "config.json", "custom_generate/generate.py",
        "held_out.safetensors", "model.safetensors",
        "precision.png", "reliability.png", "run.yaml", "sources.png", "speed.png", "traces.safetensors",
    ]  # fmt: skip
    for name in ("model.safetensors", "calibration.json", "traces.safetensors", "held_out.safetensors", "speed.png"):
        assert files[name] == (folder / name).read_bytes()
    assert hashes(folder) == before


def test_again_there_is_nothing_to_do_and_a_change_is_one_more_commit(hub, folder):
    first = publish(folder, NAME)
    again = publish(folder, NAME)
    assert (again.commit, again.changed) == (first.commit, False)
    assert not [line for line in hub.log if "/commit/" in line][1:]
    (folder / "sources.png").unlink()
    rename(folder, license="mit")
    sent = len(hub.log)
    second = publish(folder, NAME, tag="v2")
    assert second.changed and "sources.png" not in hub.files(NAME)
    assert b"mit" in hub.files(NAME)["config.json"] and len(hub.repositories[NAME].commits) == 3
    assert not [line for line in hub.log[sent:] if line.startswith("PUT")]
    with pytest.raises(AdapterError, match="has a tag v2 already"):
        rename(folder, license="apache-2.0")
        publish(folder, NAME, tag="v2")
    assert publish(folder, NAME, tag="v3").changed


def test_a_branch_and_a_pull_request(hub, folder):
    publish(folder, NAME, revision="next")
    repository = hub.repositories[NAME]
    assert list(hub.files(NAME)) == [".gitattributes"] and "config.json" in hub.files(NAME, "next")
    proposed = publish(folder, NAME, create_pr=True)
    assert proposed.url == f"{hub.url}/{NAME}/discussions/1" and list(hub.files(NAME)) == [".gitattributes"]
    again = publish(folder, NAME, create_pr=True)
    assert (again.changed, again.url, again.commit) == (False, proposed.url, proposed.commit)
    assert len(repository.proposals) == 1
    with pytest.raises(ConfigError, match="leave out revision and tag"):
        publish(folder, NAME, create_pr=True, tag="v1")


def test_what_is_there_and_not_ours_stays(hub, folder):
    hub.put(NAME, {"config.json": b'{"model_type": "llama"}'}, private=True)
    assert "holds something else" in refusal(folder, NAME)
    hub.put("some-org/open", {".gitattributes": b""})
    assert "is there and public: give --public" in refusal(folder, "some-org/open")
    assert publish(folder, "some-org/open", private=False).changed
    assert "is there and private: leave out --public" in refusal(folder, NAME, private=False)
    assert list(hub.files(NAME)) == ["config.json"]
    hub.repositories["some-org/open"].tags["v1"] = hub.repositories["some-org/open"].branches["main"]
    assert "v1 is a tag" in refusal(folder, "some-org/open", revision="v1", private=False)


def test_a_claimed_base_is_loaded_and_compared(hub, fitted, tiny_base, make_model, make_tokenizer, tmp_path):
    base = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    commit = hub.put(BASE, base)
    with pytest.raises(AdapterError, match="names no revision"):
        publish(fitted, NAME, claims=Claims(BASE))
    assert publish(fitted, NAME, claims=Claims(BASE, commit)).changed
    assert json.loads(hub.files(NAME)["config.json"])["base_model_revision"] == commit
    make_model(seed=3).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    other = hub.put("some-org/other", {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()})
    with pytest.raises(BaseModelMismatch, match="other weights"):
        publish(fitted, "some-org/another", claims=Claims("some-org/other", other))
    assert "some-org/another" not in hub.repositories


@pytest.mark.parametrize("name", ["no-organisation", "a/b/c", "a/../b", "a/b c", "", "a/" + "b" * 200, "a/b\n"])
def test_a_name_that_no_repository_has(hub, folder, name):
    with pytest.raises(ConfigError, match="expected ORG/NAME"):
        publish(folder, name)
    assert hub.log == []


def test_the_command(hub, folder, fitted):
    def run(*arguments):
        return CliRunner().invoke(app, ["publish", *map(str, arguments)])

    result = run(folder, NAME, "--tag", "v1", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["changed"] and found["commit"] == hub.repositories[NAME].branches["main"]
    assert "as it was: nothing to do" in run(folder, NAME).stdout
    result = run(fitted, NAME)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "--base-model" in json.loads(run(fitted, NAME, "--json").stdout)["error"]


def test_a_fit_that_could_not_be_published_is_not_begun(make_recipe, tmp_path, monkeypatch):
    wanted = {"push_to_hub": True, "hub_model_id": NAME, "license": "apache-2.0", "model_name_or_path": BASE}
    monkeypatch.setenv("HF_TOKEN", "")
    for change, expected in [
        ({"hub_model_id": None}, "hub_model_id"),
        ({"hub_model_id": "somewhere"}, "expected ORG/NAME"),
        ({"model_name_or_path": str(tmp_path)}, "a base from the Hub"),
        ({"license": None}, "the adapter's licence"),
        ({}, "run `hf auth login`"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            fit(FitConfig(**make_recipe(tmp_path / "out", **wanted | change)))


def test_an_adapter_is_a_fair_copy_after_tuning(fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "adapter")
    (tmp_path / "adapter" / "speed.json").write_text("{}")
    costs = CostTable.counted(6, head=0.3, unembedding=2.0)
    tune_adapter(tmp_path / "adapter", costs, Held(None, None, None))
    tuned = (tmp_path / "adapter" / "README.md").read_text()
    write_card(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == tuned  # as it is written again from the files
    assert (tmp_path / "adapter" / "custom_generate" / "generate.py").is_file()
    assert not (tmp_path / "adapter" / "speed.json").exists()
    save_adapter(load_adapter(fitted), tmp_path / "bare")  # one that transformers cannot call
    assert not (tmp_path / "bare" / "custom_generate").exists()
