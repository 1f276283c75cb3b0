"""What tests of publishing share: names, and how an adapter's folder is changed, compared and refused."""

import dataclasses
import hashlib

import pytest

from runtime import AdapterError, load_adapter
from tests.helpers.loopback_hub import TOKEN
from train.publishing.publish import publish

NAME, BASE = "some-org/tiny-specbound", "some-org/tiny-base"


def rename(folder, **changes):
    config = dataclasses.replace(load_adapter(folder).config, **changes)
    (folder / "config.json").write_text(config.to_json())


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments, **options):
    with pytest.raises(AdapterError) as caught:
        publish(*arguments, **options)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)
