"""Prompts in pieces: how many positions have other keys or values than in stock's one forward of the whole prompt.

That is why prompts are not read in chunks, and of others that began alike only whole blocks of 512 are taken. Example:
python scripts/cuts.py HuggingFaceTB/SmolLM2-135M-Instruct --threads 2
"""

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from runtime.base import find_base, load_model

CASES = [(100, 32), (100, 64), (200, 128), (600, 256), (600, 512), (900, 512), (900, 768), (1200, 1024)]


def main(
    base: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Cut random prompts once, each at one place, and compare."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(find_base(base), {}, dtype=dtype).eval()
    table = Table("prompt", "cut at", "other before the cut", "other after it")
    for length, cut in CASES:
        before, after = differing(model, length, cut)
        table.add_row(str(length), str(cut), f"{before} of {cut}", f"{after} of {length - cut}")
    Console().print(table)


@torch.inference_mode()
def differing(model: Any, length: int, cut: int) -> tuple[int, int]:
    """Positions with other keys or values in any layer, before and after the cut of a random prompt."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
    whole, pieces = rows(model, [ids]), rows(model, [ids[:, :cut], ids[:, cut:]])
    other = (whole != pieces).any(0).any(-1)
    return int(other[:cut].sum()), int(other[cut:].sum())


def rows(model: Any, pieces: list[Tensor]) -> Tensor:
    """Keys and values of all layers, shape [layers, T, numbers], after forwards of these pieces."""
    cache = DynamicCache(config=model.config)
    for piece in pieces:
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    both = [torch.cat([layer.keys, layer.values], 1)[0] for layer in cache.layers]
    return torch.stack([heads.transpose(0, 1).flatten(1) for heads in both])


if __name__ == "__main__":
    typer.run(main)
