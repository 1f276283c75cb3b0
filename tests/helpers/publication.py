"""What tests of publishing share: names, and how an adapter's folder is changed, compared and refused."""

import dataclasses
import hashlib

import pytest

from runtime import AdapterError, load_adapter
from tests.helpers.hub.server import TOKEN
from train.publishing.publish import publish

NAME, BASE = "some-org/tiny-specbound", "some-org/tiny-base"


def rename(folder, **changes):
    config = dataclasses.replace(load_adapter(folder).config, **changes)
    (folder / "config.json").write_text(config.to_json())


def content(adapter):
    """Everything that decides what an adapter does, comparable with ==."""
    state = {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in adapter.heads.state_dict().items()}
    config = dataclasses.replace(adapter.config, weights_sha256="")
    return config, state, adapter.draft_to_target.tolist()


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments, **options):
    with pytest.raises(AdapterError) as caught:
        publish(*arguments, **options)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)
