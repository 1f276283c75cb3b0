"""Write docs/models.md: the model types that are accelerated, and what is known of each. Read off the code.

Example: python scripts/models.py
"""

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING

from runtime.decoding.families import FAMILIES, layers_with_keys, own_attentions
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.wrappers import WRAPPERS
from runtime.exact.execution import mixtures
from train.planning.shapes import KNOWN

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
HEADING = """# Models

`runtime.supports(model)` says whether a model can be accelerated, and if not, which part is missing; it takes a loaded
model, a config, a folder or a Hub id, and loads no adapter. `specbound plan --model MODEL` says it before you fit.
Whatever is refused decodes plainly, as always. The attention implementation is `sdpa` or `eager`; a class of
transformers' that has no sdpa has `eager` alone.

This table is made by `python scripts/models.py`. "Native" layers run in kernels of our own, in bfloat16 on CPUs that
have the instructions for it; all others run as transformers wrote them, and have the same bits. "Fitted" names the
real bases that an adapter in this repository is for.

"Tests" compare a tiny random model with transformers' own forward, every bit below every layer, and with its
`generate`, every id over 60 tokens: greedy and sampled, in float32 and bfloat16, drafts in chains, in trees, and of
several requests together. In float32 the trees are those of several requests and the chains those of calls alone, in
bfloat16 the other way round. Drafts are right, wrong, named twice, or the last of their siblings. A family with
windows has prompts shorter than its window, as long, and longer; texts of three families with yarn go past the length
that it starts from. No pair of tokens comes twice in these texts: left to itself, a random model may say one word over
and over. Models of several kinds of input are tried so as well, each on a prompt of text and one with a picture: in
float32 the text is greedy and what follows the picture sampled, in bfloat16 the other way round.

Mixtures of experts compute the tokens of a block one by one: an expert that gets several at once adds in another
order. That is exact, and gains less than a dense model does. `specbound plan` counts memory for all experts, and work
for those that a token is sent to. A fit counts the experts of a block once for each of its tokens, as long as no costs
are measured. The weights of gpt-oss are MXFP4, whose kernels nobody has tried here: load it dequantised, with
`quantization_config=Mxfp4Config(dequantize=True)`.

"Row by row": attention that goes past transformers' interface (Falcon, GPT-J), or makes its keys anew of what is
cached (the latent attention of DeepSeek), takes the tokens of a block one by one, its Linears with it. That is exact,
and only the rest of a layer gains from blocks.

Models of several kinds of input (the second table) are accelerated where their decoder of text is of a type in the
first; a type there that ends in `_text` is inside one. Prompts of text run as ever. A picture goes through
transformers' own forward with the rest of its prompt, and the answer is drafted; a prompt that ends inside a picture
whose positions run along several axes decodes plainly, with one warning. An adapter is fitted on, and known by, the
decoder of text: one of Gemma 3's text model serves it inside the multimodal model too.

Layers with windows run natively too, where the probe finds the order in which torch adds once a window is full
([exactness](exactness.md)); elsewhere they attend row by row from there on.

| `model_type` | parts | native | tests | fitted |
|---|---|---|---|---|
"""
WRAPPED = """
| `model_type` | decoder of text | tests |
|---|---|---|
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page, with one line of its tables a model type."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.families import FAMILIES as FIRST
    from tests.helpers.families import FURTHER, INSIDE_ALONE, MIXTURES, model_type, tiny

    by_type: dict[str, list[Any]] = {}
    for name in sorted([*FIRST, *FURTHER, *MIXTURES]):
        by_type.setdefault(model_type(name), []).append(tiny(name))
    lines = {name: line(name, models, first=name in FIRST) for name, models in by_type.items()}
    lines |= {name: line_inside(name) for name in INSIDE_ALONE}
    return HEADING + "".join(lines[name] for name in sorted(lines)) + WRAPPED + "".join(map(wrapped, sorted(WRAPPERS)))


def line(model_type: str, models: list[Any], *, first: bool) -> str:
    """Of tiny models of one type; the first families have further tests."""
    tests = "`test_families.py`" + (", `test_generate.py`, `test_trees.py`" if first else "")
    tests += ", `test_windows.py`" if FAMILIES[model_type].windows else ""
    native = "yes" if FAMILIES[model_type].norms else "no"
    return f"| `{model_type}` | {parts(models)} | {native} | {tests} | {fitted(model_type)} |\n"


def line_inside(model_type: str) -> str:
    """Of a decoder that has no model of its own."""
    family = FAMILIES[model_type]
    seen = "full attention or windows" if family.windows else "full attention"
    kind = "mixture of experts" if "_moe" in model_type else "dense"
    native = "yes" if family.norms else "no"
    return f"| `{model_type}` | {kind}, {seen}, rotary positions | {native} | `test_wrappers.py` | tiny only |\n"


def wrapped(model_type: str) -> str:
    """Of a model of several kinds of input; its default config says what is inside."""
    inner = CONFIG_MAPPING[model_type]().get_text_config().model_type
    others = "" if inner.endswith("_text") else ", or what else its `text_config` names"
    return f"| `{model_type}` | `{inner}`{others} | `test_wrappers.py` |\n"


def parts(models: list[Any]) -> str:
    """What the layers are made of, in a few words."""
    model, layers = models[0], DecoderLayers(models[0])
    kinds = ["mixture of experts" if mixtures(each) else "dense" for each in models]
    windows = FAMILIES[model.config.model_type].windows
    seen = "latent attention" if getattr(model.config, "kv_lora_rank", None) else "full attention"
    found = [" or ".join(dict.fromkeys(kinds)), f"{seen} or windows" if windows else seen]
    if any(layers_with_keys(each.config) < each.config.num_hidden_layers for each in models):
        found.append("layers that read the keys of others")
    if own_attentions(model):
        found.append("row by row")
    if layers.positions is None:
        found.append("rotary positions")
    else:
        found.append("learned positions" if isinstance(layers.positions, nn.Embedding) else "sines as positions")
    if layers.logits_factor is not None or layers.logits_scaling != 1.0:
        found.append("scaled logits")
    if layers.logits_cap is not None:
        found.append("capped logits")
    if model.config._attn_implementation == "eager":
        found.append("`eager` alone")
    return ", ".join(found)


def fitted(model_type: str) -> str:
    """The real bases of this type that adapters in this repository are for."""
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("adapters/*/config.json")]
    names = {config["base_model_name_or_path"] for config in configs}
    mine = sorted(name for name in names if KNOWN[name]["model_type"] == model_type)
    return ", ".join(name.partition("/")[2] for name in mine) or "tiny only"


if __name__ == "__main__":
    main()
