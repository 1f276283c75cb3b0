"""Recall of exit heads on held-out text: how often the base's choice is among their k best, draft by draft.

Prints one line of a Markdown table an exit. Quoted in docs/heads.md. Example:
python scripts/recall.py outputs/mix/adapter/model.safetensors outputs/mix/corpus --head attention --limit 200
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from runtime.base import find_base, load_model
from runtime.conditions import conditions
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import HEAD_KINDS, ExitHeads, attends
from runtime.files import write_atomic
from train.corpus.corpus import load_split
from train.features.extractor import FeatureExtractor, Sequences
from train.features.prompts import PROMPT_TOKENS

BEST = (1, 2, 3, 4, 8)
DRAFTS = (1, 2, 3, 4)


def main(
    weights: Annotated[Path, typer.Argument(help="The heads: model.safetensors of an adapter.")],
    corpus: Annotated[Path, typer.Argument(help="Folder of a corpus.")],
    base: Annotated[str, typer.Option(help="Hub id or folder.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    head: Annotated[str, typer.Option(help=f"One of {', '.join(HEAD_KINDS)}.")] = "attention",
    limit: Annotated[int, typer.Option(min=1, help="Texts of the held-out split.")] = 200,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print, keep the figures."""
    if threads is not None:
        torch.set_num_threads(threads)
    layers = DecoderLayers(load_model(find_base(base), {}, dtype=torch.bfloat16).eval().requires_grad_(False))
    rows = Sequences.from_corpus(load_split(corpus, "held_out").select(range(limit)), max_length=1024, name="held_out")
    heads = read_heads(weights, head, layers)
    found = measure(heads, layers, rows, prompt_tokens=PROMPT_TOKENS if attends(head) else 0)
    print("\n".join(lines(found)))
    if json_file is not None:
        figures = conditions(layers.device, layers.dtype) | {"recall": found}
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


def read_heads(weights: Path, kind: str, layers: DecoderLayers) -> DraftHeads:
    """The heads in a file, on a base, in its dtype."""
    tensors = load_file(weights)
    vocabulary = tensors.pop("draft_to_target")
    exits = sorted({int(name.split(".")[1]) for name in tensors})
    rank = next((tensor.shape[1] for name, tensor in tensors.items() if name.endswith("down.weight")), 1)
    size = layers.config.hidden_size
    made = ExitHeads(kind, exits, hidden_size=size, draft_vocab_size=len(vocabulary), rank=rank)
    made.load_state_dict(tensors)
    return DraftHeads.of(made.to(layers.dtype).eval(), layers, vocabulary)


@torch.no_grad()
def measure(
    heads: DraftHeads, layers: DecoderLayers, rows: Sequences, *, prompt_tokens: int
) -> dict[int, dict[int, dict[int, float]]]:
    """Exit layer -> draft of a round -> k -> share of positions; those that all drafts can stand at."""
    extract = FeatureExtractor(layers, heads.exit_layers, top_k=1, prompt_tokens=prompt_tokens)
    hits: dict[int, dict[int, Any]] = {layer: dict.fromkeys(DRAFTS, 0) for layer in heads.exit_layers}
    total = 0
    for start in range(0, len(rows), 8):
        features = extract(rows.rows[start : start + 8])
        late = torch.cat([torch.arange(length) for length in features.lengths]) >= max(DRAFTS)
        choice = heads.target_to_draft[features.target][late, None]
        total += int(late.sum())
        for draft in DRAFTS:
            for layer, logits in heads(features.hidden, features.context(draft)).items():
                best = logits[late].topk(max(BEST)).indices == choice
                hits[layer][draft] += torch.stack([best[:, :k].any(-1).sum() for k in BEST])
    return {
        layer: {draft: dict(zip(BEST, (each[draft] / total).tolist(), strict=True)) for draft in DRAFTS}
        for layer, each in hits.items()
    }


def lines(found: dict[int, dict[int, dict[int, float]]]) -> list[str]:
    """The table."""
    said = [
        "| exit | " + " | ".join(f"draft {draft}: {' / '.join(f'@{k}' for k in BEST)}" for draft in DRAFTS) + " |",
        "|---" * (len(DRAFTS) + 1) + "|",
    ]
    for layer, drafts in found.items():
        cells = [" / ".join(f"{share:.3f}" for share in drafts[draft].values()) for draft in DRAFTS]
        said.append(f"| {layer} | " + " | ".join(cells) + " |")
    return said


if __name__ == "__main__":
    typer.run(main)
