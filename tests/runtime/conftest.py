"""A base and an adapter for it, as folders."""

import pytest

from runtime import save_adapter


@pytest.fixture
def base(tmp_path, make_model, make_tokenizer):
    """Folder of a tiny base with its tokenizer."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path, base, make_model, make_adapter):
    """Folder of an adapter for it."""
    made = make_adapter(make_model(), base_model_name_or_path=str(base))
    save_adapter(made, tmp_path / "adapter")
    return tmp_path / "adapter"
