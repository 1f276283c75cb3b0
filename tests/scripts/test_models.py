"""The page of supported models is what the script makes of the code."""

from tests.helpers.families import tiny
from tests.helpers.paths import ROOT
from tests.helpers.scripts import script


def test_the_page_is_what_the_script_makes() -> None:
    """Run `python scripts/models.py` where it is not."""
    models = script("models")
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == models.page()


def test_the_page_says_what_it_should() -> None:
    """One line a type, and negative control: of other code another line comes."""
    models = script("models")
    text = models.PAGE.read_text(encoding="utf-8").split("|---|---|---|---|---|\n")[1]
    lines, wrapped = (table.splitlines() for table in text.split(models.WRAPPED))
    assert len(lines) == len(models.FAMILIES) and len(wrapped) == len(models.WRAPPERS)
    assert sum("SmolLM2-135M-Instruct" in line for line in lines) == 1
    assert sum("mixture of experts" in line for line in lines) >= 10
    assert models.line("llama", [tiny("llama")], first=True) in "\n".join([*lines, ""])
    models.FAMILIES = models.FAMILIES | {"llama": models.FAMILIES["phi"]}
    assert models.line("llama", [tiny("llama")], first=True) not in "\n".join([*lines, ""])
