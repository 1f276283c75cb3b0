"""Saving an adapter: whole or not at all, over an adapter or an empty folder only."""

import os
import shutil
from pathlib import Path

import pytest

import runtime.adapter.folder as module
from runtime import AdapterError, ConfigError, load_adapter, save_adapter
from runtime.adapter.folder import Adapter
from runtime.adapter.hub import resolve_adapter
from tests.helpers.publication import content


@pytest.fixture(scope="module")
def other(make_model, make_adapter):
    return make_adapter(make_model(seed=1), seed=1, draft_vocab_size=16)


STEPS = [(module.os, "replace"), (module.os, "fsync"), (module, "save_file"), (Path, "write_text"),
         (module.tempfile, "mkdtemp"), (Path, "mkdir"), (module, "load_adapter")]  # fmt: skip


def fail_at(monkeypatch, owner, name, turn, error):
    """Let call number `turn` of a function raise; returns the list of calls made."""
    stock, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == turn + 1:
            raise error
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("owner", "name"), STEPS)
def test_a_save_that_fails_anywhere_leaves_old_or_new(
    adapter, other, tmp_path, monkeypatch, owner, name, before, error
):
    folder, turn, num_failed = tmp_path / "out" / "adapter", 0, 0
    while True:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if before:
            save_adapter(adapter, folder)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, owner, name, turn, error)
            try:
                save_adapter(other, folder)
                failed = False
            except (AdapterError, KeyboardInterrupt) as caught:
                failed = True
                assert type(caught) is not AdapterError or "No space left on device" in str(caught)
        left = os.listdir(folder.parent) if folder.parent.exists() else []
        if len(calls) <= turn:  # every call has had its turn
            assert not failed and content(load_adapter(folder)) == content(other)
            break
        num_failed += failed
        if failed and before:
            assert content(load_adapter(folder)) == content(adapter)
        assert left == (["adapter"] if before or not failed else [])
        turn += 1
    assert num_failed == turn >= 1


def test_what_extra_writes_appears_with_the_rest_or_not_at_all(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "a", extra=lambda path: (path / "README.md").write_text("card"))
    assert (tmp_path / "a" / "README.md").read_text() == "card"

    def fail(path):
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError, match="no card"):
        save_adapter(adapter, tmp_path / "b", extra=fail)
    assert os.listdir(tmp_path) == ["a"]


def test_only_an_adapter_or_an_empty_folder_is_replaced(adapter, other, folder, tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "base")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("base", "notes", "file", "file/inside"):
        with pytest.raises(AdapterError) as caught:
            save_adapter(adapter, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "base" / "model.safetensors").exists()
    assert (tmp_path / "file").read_text() == (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for name in ("empty", "link", "adapter"):
        save_adapter(other, tmp_path / name)
        assert content(load_adapter(tmp_path / name)) == content(other)
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_cannot_be_written(adapter):
    with pytest.raises(AdapterError, match=r"cannot write .*/dev/null/adapter"):
        save_adapter(adapter, "/dev/null/adapter")


def test_an_adapter_that_would_not_load_is_not_written(adapter, tmp_path):
    bad = Adapter(adapter.config, adapter.heads, adapter.draft_to_target.clone().fill_(3))
    with pytest.raises(AdapterError, match="different token ids"):
        save_adapter(bad, tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_resolving_folders_files_and_wrong_ids(folder, tmp_path):
    assert resolve_adapter(folder) == resolve_adapter(str(folder)) == folder
    with pytest.raises(ConfigError, match="leave it out"):
        resolve_adapter(folder, revision="main")
    wrong = {
        folder / "config.json": "is not a folder",
        tmp_path / "absent": "does not exist: expected the adapter's folder, or a Hub id",
        "a/b/c": "does not exist: expected the adapter's folder, or a Hub id",
        "no spaces/here": "does not exist: expected the adapter's folder, or a Hub id",
        "nobody/nothing": "no folder here, and the Hub could not give it",
        "x" * 5000: "cannot be looked up",
        "a\0b": "",
    }
    for name, expected in wrong.items():
        with pytest.raises(AdapterError) as caught:
            resolve_adapter(name)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_adapter_gives_the_same_bytes(make_model, make_adapter, tmp_path):
    """Written several times: names in any order inside the file would change its hash."""
    adapter = make_adapter(make_model())
    written = [save_adapter(adapter, tmp_path / str(number)).weights_sha256 for number in range(8)]
    assert len(set(written)) == 1
