"""An adapter of a tiny base, and its folder."""

import pytest

from runtime import save_adapter


@pytest.fixture(scope="module")
def adapter(make_model, make_adapter):
    return make_adapter(make_model(), draft_vocab_size=32)


@pytest.fixture
def folder(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"
