"""The probe: which operations must run row by row on this machine, so that a block has the bits of plain decoding.

Compared on real activations: text the base itself continues, decoded one token at a time by the stock forward.
First every Linear, alone, at every width of block; then the whole model, logits and cache, under the policy found.
What was checked and found is the certificate; it holds for one device, dtype, thread count and set of versions.
Knows nothing of drafting.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from runtime.cache import KVCache
from runtime.certificate import Certificate, environment, read_certificate, write_certificate
from runtime.execution import ExecutionPolicy, Shape, execution, linears
from runtime.layers import DecoderLayers

PROBE_FORMAT = 1
PROMPT_TOKENS = 24
TEXT_TEMPERATURE = 0.6
PROBE_TOKENS = 32


def certify(model: PreTrainedModel, fingerprint: str, *, max_width: int) -> Certificate:
    """The cheapest policy that keeps every bit for blocks of up to `max_width` tokens, probed or read from disk.

    Args:
        fingerprint: names the base's weights; part of what a stored certificate holds for.
        max_width: `max_draft_tokens + 1`.
    """
    where = environment(model)
    key = {**where, "base": fingerprint, "attention": model.config._attn_implementation}
    key |= {"max_width": max_width, "format": PROBE_FORMAT}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(constants.HF_HOME) / "specbound" / f"certificate-{digest}.json"
    stored = read_certificate(path)
    if stored is not None:
        return stored
    with torch.autocast(model.device.type, enabled=False):
        certificate = probe(model, max_width=max_width)
    if certificate.bitwise:  # a failure is looked at anew: it may have been of the moment
        write_certificate(path, certificate)
    return certificate


@torch.no_grad()
def probe(model: PreTrainedModel, *, max_width: int) -> Certificate:
    """Find and confirm the cheapest policy; see `certify`."""
    started = time.perf_counter()
    reference = Reference.decode(model)
    widths = range(2, max_width + 1)
    checked = differing = 0
    found = frozenset(differing_shapes(model, reference, widths))
    for policy in (ExecutionPolicy(True, found), ExecutionPolicy.rowwise()):
        checked, differing = compare(model, reference, policy, widths)
        if differing == 0:
            break
    shapes = None if policy.rowwise_linears is None else tuple(sorted(policy.rowwise_linears))
    return Certificate(
        bitwise=differing == 0,
        max_width=max_width if differing == 0 else 1,
        rowwise_attention=True,
        rowwise_linears=shapes,
        rows_checked=checked,
        rows_differing=differing,
        seconds=round(time.perf_counter() - started, 2),
        **environment(model),
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """One text decoded one token at a time by the stock forward.

    Attributes:
        token_ids: shape [1, PROMPT_TOKENS + PROBE_TOKENS], int64.
        logits: of the last `PROBE_TOKENS` positions, each [1, V].
        cache: keys and values of all positions.
        rows: each Linear's inputs at those positions, [1, in] each, and outputs.
    """

    token_ids: Tensor
    logits: list[Tensor]
    cache: Any
    rows: dict[Any, list[tuple[Tensor, Tensor]]]

    @classmethod
    def decode(cls, model: PreTrainedModel) -> "Reference":
        """Let the base write a text of its own, from the token that begins one."""
        rows: dict[Any, list[tuple[Tensor, Tensor]]] = {module: [] for module in linears(model)}

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows[module].append((args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])))

        start = model.config.bos_token_id or 0
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.tensor([[start]], device=model.device)
        cache, logits = DynamicCache(), []
        hooks = [module.register_forward_hook(record) for module in rows]
        try:
            for _ in range(PROMPT_TOKENS + PROBE_TOKENS):
                output = model(input_ids=token_ids[:, -1:], past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1])
                # Drawn, and not too wildly: neither a loop of one phrase nor noise has the activations of text.
                probs = (logits[-1].float().cpu() / TEXT_TEMPERATURE).softmax(-1)
                newest = torch.multinomial(probs, 1, generator=generator)
                token_ids = torch.cat([token_ids, newest.to(model.device)], dim=1)
        finally:
            for hook in hooks:
                hook.remove()
        for module, seen in rows.items():
            rows[module] = seen[PROMPT_TOKENS:]
        return cls(token_ids[:, :-1], logits[PROMPT_TOKENS:], cache, rows)


def differing_shapes(model: PreTrainedModel, reference: Reference, widths: Sequence[int]) -> set[Shape]:
    """Weight shapes of the Linears whose rows differ in some bit from one-by-one rows, at any of these widths."""
    found: set[Shape] = set()
    for module, rows in reference.rows.items():
        shape = tuple(module.weight.shape)
        for width in widths:
            if shape in found:
                break
            for start in range(0, len(rows) - width + 1, width):
                block = rows[start : start + width]
                together = module(torch.cat([given for given, _ in block]).unsqueeze(0))[0]
                if not torch.equal(together, torch.cat([output for _, output in block])):
                    found.add(shape)
                    break
    return found


def compare(
    model: PreTrainedModel, reference: Reference, policy: ExecutionPolicy, widths: Sequence[int]
) -> tuple[int, int]:
    """Run blocks of every width through the whole model; rows of logits and cache compared, and how many differ."""
    layers = DecoderLayers(model)
    checked = differing = 0
    with execution(model, policy):
        for width in widths:
            for start in range(0, PROBE_TOKENS - width + 1, width):
                rows = _block(layers, reference, start, width)
                checked += len(rows)
                differing += sum(not same for same in rows)
    return checked, differing


def _block(layers: DecoderLayers, reference: Reference, start: int, width: int) -> list[bool]:
    """Whether each row of one block, and the keys and values it wrote, have stock's bits."""
    first = PROMPT_TOKENS + start
    cache = KVCache.from_dynamic(reference.cache, first + width)
    cache.crop(first)
    hidden = layers.embed(reference.token_ids[:, first : first + width], first)
    hidden = layers.run(hidden, 0, layers.num_layers, first, cache)
    logits = layers.logits(hidden)[0]
    same = [torch.equal(logits[row], reference.logits[start + row][0]) for row in range(width)]
    for index, layer in enumerate(reference.cache.layers):
        for mine, stock in zip(cache.rows(index, first), (layer.keys, layer.values), strict=True):
            assert stock is not None
            equal = (mine == stock[:, :, first : first + width]).flatten(3).all(-1).all(1)[0]
            same = [one and bool(other) for one, other in zip(same, equal.tolist(), strict=True)]
    return same
