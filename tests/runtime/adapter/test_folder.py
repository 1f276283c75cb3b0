"""Adapter folders: the round trip, every kind of damage, and a save that fails at any step."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import AdapterError, load_adapter, save_adapter
from runtime.adapter.config import SpecBoundConfig
from runtime.adapter.identity import file_sha256
from runtime.drafting.heads import HEAD_KINDS
from tests.helpers.publication import content


def refusal(folder):
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, change):
    """Let `change` alter the tensors, and write a config that vouches for the result."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = SpecBoundConfig.from_json((folder / "config.json").read_text(), source="")
    config = dataclasses.replace(config, weights_sha256=file_sha256(folder / "model.safetensors"))
    (folder / "config.json").write_text(config.to_json())


@pytest.mark.parametrize("head", HEAD_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_equal_bit_for_bit(make_model, make_adapter, tmp_path, head, dtype):
    made = make_adapter(make_model(), head=head, draft_vocab_size=128 if head == "lora" else 64)
    made.heads.to(dtype)
    saved = save_adapter(made, tmp_path / "new" / "adapter")
    loaded = load_adapter(tmp_path / "new" / "adapter")
    bits = {name: t.view(torch.uint8).tolist() for name, t in made.heads.state_dict().items()}
    assert {name: t.view(torch.uint8).tolist() for name, t in loaded.heads.state_dict().items()} == bits
    assert {t.dtype for t in loaded.heads.state_dict().values()} == {dtype}
    assert torch.equal(loaded.draft_to_target, made.draft_to_target)
    assert loaded.config == saved == dataclasses.replace(made.config, weights_sha256=saved.weights_sha256)
    assert not loaded.heads.training and not any(p.requires_grad for p in loaded.heads.parameters())
    assert sorted(os.listdir(tmp_path / "new")) == ["adapter"]
    files = [tmp_path / "new" / "adapter" / name for name in ("config.json", "model.safetensors")]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_loading_draws_no_random_numbers_and_outlives_the_file(folder, adapter):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    loaded = load_adapter(folder)
    assert torch.equal(torch.rand(4), expected)
    (folder / "model.safetensors").write_bytes(b"")  # in place: a mapped tensor would be gone
    assert content(loaded) == content(adapter)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 7, 8, header - 1, header, (header + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "model.safetensors is incomplete or damaged, download it again" in refusal(folder)
    path.write_bytes(whole + b"\0")
    assert "damaged" in refusal(folder)


def test_a_header_that_promises_more_than_the_file_holds(folder):
    path = folder / "model.safetensors"
    huge = {"heads.2.down.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(huge).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "damaged" in refusal(folder)
    path.write_bytes(struct.pack("<Q", 1 << 62) + text)
    assert "damaged" in refusal(folder)


def test_a_config_that_promises_huge_heads_costs_no_memory(folder):
    config = SpecBoundConfig.from_json((folder / "config.json").read_text(), source="")
    huge = dataclasses.replace(config, hidden_size=10_000_000, head_rank=10_000_000)
    (folder / "config.json").write_text(huge.to_json())
    assert "expected (10000000, 10000000)" in refusal(folder)


GATE = "heads.2.gate_up.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(GATE), f"missing {GATE}"),
        (lambda t: t.pop("draft_to_target"), "missing draft_to_target"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected 'extra'"),
        (lambda t: t.update({"heads.3.down.weight": torch.zeros(1)}), "unexpected 'heads.3.down.weight'"),
        (lambda t: t.update(renamed=t.pop(GATE)), f"missing {GATE}; unexpected 'renamed'"),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), f"{GATE} has shape (96, 16), expected (16, 96)"),
        (lambda t: t.update({GATE: t[GATE][:0]}), f"{GATE} has shape (0, 96)"),
        (lambda t: t.update({GATE: t[GATE].double()}), f"{GATE} has dtype F64, expected F32"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), f"{GATE} has dtype I8"),
        (lambda t: t[GATE][3, 4].fill_(float("nan")), f"{GATE} has values that are not finite"),
        (lambda t: t[GATE][3, 4].fill_(float("-inf")), f"{GATE} has values that are not finite"),
        (lambda t: t.update(draft_to_target=t["draft_to_target"].int()), "draft_to_target has dtype I32"),
        (lambda t: t["draft_to_target"][1:2].copy_(t["draft_to_target"][:1]), "different token ids"),
        (lambda t: t["draft_to_target"][0].fill_(128), "token ids from 0 to 127"),
        (lambda t: t["draft_to_target"][0].fill_(-1), "token ids from 0 to 127"),
        (lambda t: t.clear(), "and 12 more"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, expected):
    rewrite(folder, change)
    assert expected in refusal(folder)


def test_weights_of_another_adapter_of_the_same_shape(folder, adapter, make_model, make_adapter, tmp_path):
    save_adapter(make_adapter(make_model(), seed=5, draft_vocab_size=32), tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", folder)
    assert "has sha256" in refusal(folder)


def test_flipped_bytes_are_never_a_silently_different_adapter(folder, adapter):
    generator, good = random.Random(0), content(adapter)
    refused = 0
    for name, trials in (("config.json", 60), ("model.safetensors", 90)):
        path = folder / name
        whole = path.read_bytes()
        for _ in range(trials):
            bad = bytearray(whole)
            bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
            path.write_bytes(bad)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = load_adapter(folder)
                except AdapterError as error:
                    assert "\n" not in str(error)
                    refused += 1
                    continue
            assert name == "config.json" and (caught or content(found) == good)
        path.write_bytes(whole)
    assert refused > 100 and content(load_adapter(folder)) == good


def test_pickles_beside_it_are_never_opened(folder, adapter, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "model.pkl", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert content(load_adapter(folder)) == content(adapter)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "damaged" in refusal(folder)
    assert not (tmp_path / "opened").exists()


def test_what_stands_in_place_of_a_file(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path / "absent", path)):
            (folder / name).unlink()
            make(folder / name)
            message = refusal(folder)
            assert name in message and "not a regular file" in message
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
            (folder / name).write_bytes(kept)
        (folder / name).unlink()
        assert f"{name} cannot be read, no such file in" in refusal(folder)
        (folder / name).write_bytes(kept)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json cannot be read, no such file in" in refusal(empty)
    assert "is not a folder" in refusal(tmp_path / "absent")


def test_a_folder_of_links_as_the_hub_cache_makes_it(folder, adapter, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(folder / name)
    assert content(load_adapter(tmp_path / "snapshot")) == content(adapter)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_may_not_be_read(folder, monkeypatch, name):
    opened = Path.open

    def denied(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    message = refusal(folder)
    assert name in message and "Permission denied" in message


def test_a_config_that_is_not_text_or_too_long(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal(folder)
    (folder / "config.json").write_bytes(b" " * 2_000_000)
    assert "more than 1000000 bytes" in refusal(folder)
