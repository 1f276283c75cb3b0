"""The probe: which operations must run row by row on this machine, so that a block has the bits of plain decoding.

Compared on real activations: text the base itself continues, decoded one token at a time by the stock forward.
First every Linear, alone, at every width of block; then the whole model, logits and cache, under the policy found,
near the beginning of a text and far into one. What was checked and found is the certificate; it holds for one
device, dtype, thread count and set of versions. Knows nothing of drafting.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from runtime.cache import KVCache
from runtime.certificate import Certificate, environment, read_certificate, write_certificate
from runtime.execution import ExecutionPolicy, Shape, call_in_rows, execution, linears
from runtime.layers import DecoderLayers

PROBE_FORMAT = 2
PROMPT_TOKENS = 24
PROBE_TOKENS = 32
TEXT_TEMPERATURE = 0.6
# Attention splits its work by the number of keys: rows far into a text are compared too.
FAR_CONTEXT = 2048
FAR_TOKENS = 16
# Cheapest first: one call for the block, one call at a steady number of rows, one call a row.
LINEAR_ROWS = (None, 8, 16, 32, 1)


def certify(model: PreTrainedModel, fingerprint: str, *, max_width: int, exactness: str = "bitwise") -> Certificate:
    """The cheapest policy that keeps every bit for blocks of up to `max_width` tokens, probed or read from disk.

    Args:
        fingerprint: names the base's weights; part of what a stored certificate holds for.
        max_width: `max_draft_tokens + 1`.
        exactness: with `batched` nothing is sought: the certificate says how far batched blocks are off.
    """
    where = environment(model)
    key = {**where, "base": fingerprint, "attention": model.config._attn_implementation}
    key |= {"max_width": max_width, "exactness": exactness, "format": PROBE_FORMAT}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(constants.HF_HOME) / "specbound" / f"certificate-{digest}.json"
    stored = read_certificate(path)
    if stored is not None:
        return stored
    with torch.autocast(model.device.type, enabled=False):
        certificate = probe(model, max_width=max_width, exactness=exactness)
    if certificate.bitwise or exactness == "batched":  # a failure is looked at anew: it may have been of the moment
        write_certificate(path, certificate)
    return certificate


@torch.no_grad()
def probe(model: PreTrainedModel, *, max_width: int, exactness: str = "bitwise") -> Certificate:
    """Find and confirm the cheapest policy, or measure the batched one; see `certify`."""
    started = time.perf_counter()
    near = Reference.near(model)
    far = Reference.far(model, near)
    widths = range(2, max_width + 1)
    whole = exactness == "batched"
    if whole:
        policies = [ExecutionPolicy.batched()]
    else:
        found = linear_rows(near, widths)
        policies = [ExecutionPolicy(False, found), ExecutionPolicy(True, found), ExecutionPolicy.rowwise()]
    agreement = Agreement()
    policy = policies[0]
    for policy in policies:
        agreement = compare(model, near, policy, widths, whole=whole)
        if far is not None and (agreement.differing == 0 or whole):
            agreement += compare(model, far, policy, sorted({2, max_width} & set(widths)), whole=whole)
        if agreement.differing == 0:
            break
    bitwise = agreement.differing == 0
    return Certificate(
        bitwise=bitwise,
        max_width=max_width if bitwise or whole else 1,
        longest_context=(far or near).length,
        policy=policy,
        rows_checked=agreement.rows,
        rows_differing=agreement.differing,
        largest_shift=agreement.largest_shift,
        seconds=round(time.perf_counter() - started, 2),
        **environment(model),
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """One text decoded one token at a time by the stock forward.

    Attributes:
        first: cache rows before the tokens compared.
        token_ids: the tokens compared, shape [1, N], int64.
        logits: at each of them, [1, V].
        cache: keys and values of all positions.
        rows: each Linear's inputs at those positions, [1, in] each, and outputs.
    """

    first: int
    token_ids: Tensor
    logits: list[Tensor]
    cache: Any
    rows: Mapping[nn.Module, list[tuple[Tensor, Tensor]]]

    @property
    def length(self) -> int:
        """Tokens of the whole text."""
        return self.first + len(self.logits)

    @classmethod
    def near(cls, model: PreTrainedModel) -> "Reference":
        """A text of the base's own, from the token that begins one."""
        cache = DynamicCache()
        start = torch.tensor([[model.config.bos_token_id or 0]], device=model.device)
        prompt, _ = _write(model, cache, start, PROMPT_TOKENS)
        rows: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in linears(model)}

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows[module].append((args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])))

        hooks = [module.register_forward_hook(record) for module in rows]
        try:
            token_ids, logits = _write(model, cache, prompt[:, -1:], PROBE_TOKENS)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(PROMPT_TOKENS, token_ids[:, :-1], logits, cache, rows)

    @classmethod
    def far(cls, model: PreTrainedModel, near: "Reference") -> "Reference | None":
        """More of that text after its own cache rows many times over; None where the model takes no long text."""
        longest = getattr(model.config, "max_position_embeddings", None) or FAR_CONTEXT + FAR_TOKENS
        first = min(FAR_CONTEXT, longest - FAR_TOKENS)
        if first <= near.length:
            return None
        cache = DynamicCache()
        for index, layer in enumerate(near.cache.layers):
            repeats = [1, 1, -(-first // near.length), 1]
            keys, values = (rows.repeat(repeats)[:, :, :first].clone() for rows in (layer.keys, layer.values))
            cache.update(keys, values, index)
        token_ids, logits = _write(model, cache, near.token_ids[:, -1:], FAR_TOKENS)
        return cls(first, token_ids[:, :-1], logits, cache, {})


def _write(model: PreTrainedModel, cache: DynamicCache, newest: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """Decode `count` tokens from `newest` [1, 1], one forward each: ids [1, count + 1] and logits, each [1, V]."""
    generator = torch.Generator().manual_seed(0)
    token_ids, logits = newest, []
    for _ in range(count):
        output = model(input_ids=token_ids[:, -1:], past_key_values=cache, use_cache=True)
        logits.append(output.logits[:, -1])
        # Drawn, and not too wildly: neither a loop of one phrase nor noise has the activations of text.
        probs = (logits[-1].float().cpu() / TEXT_TEMPERATURE).softmax(-1)
        drawn = torch.multinomial(probs, 1, generator=generator)
        token_ids = torch.cat([token_ids, drawn.to(newest.device)], dim=1)
    return token_ids, logits


def linear_rows(reference: Reference, widths: Sequence[int]) -> dict[Shape, int]:
    """Rows in one call of the Linears, by weight shape; shapes that may run as the whole block are left out."""
    by_shape: dict[Shape, list[nn.Module]] = {}
    for module in reference.rows:
        by_shape.setdefault(tuple(module.weight.shape), []).append(module)  # type: ignore[arg-type]
    found = {}
    for shape, modules in by_shape.items():
        for rows in LINEAR_ROWS:
            if rows == 1 or all(_same_rows(module, reference.rows[module], rows, widths) for module in modules):
                break
        if rows is not None:
            found[shape] = rows
    return found


def _same_rows(
    module: nn.Module, recorded: list[tuple[Tensor, Tensor]], rows: int | None, widths: Sequence[int]
) -> bool:
    """Whether blocks of these widths give every recorded row its own bits, with `rows` rows a call."""
    for width in widths:
        for start in range(0, len(recorded) - width + 1, width):
            given, expected = (torch.cat(part) for part in zip(*recorded[start : start + width], strict=True))
            if not torch.equal(call_in_rows(module, rows or width, given.unsqueeze(0))[0], expected):
                return False
    return True


@dataclass(frozen=True, slots=True)
class Agreement:
    """Rows compared with one-token decoding, how many differ in some bit, and the most that a logit does."""

    rows: int = 0
    differing: int = 0
    largest_shift: float = 0.0

    def __add__(self, other: "Agreement") -> "Agreement":
        shift = max(self.largest_shift, other.largest_shift)
        return Agreement(self.rows + other.rows, self.differing + other.differing, shift)


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    reference: Reference,
    policy: ExecutionPolicy,
    widths: Sequence[int],
    *,
    whole: bool = False,
) -> Agreement:
    """Decode the reference's tokens again, in blocks of each width, each block on the rows the last one left.

    Args:
        whole: go on after a block that differs, to see how far off it gets.
    """
    layers = DecoderLayers(model)
    cache = KVCache.from_dynamic(reference.cache, reference.length + max(widths, default=0))
    found = Agreement()
    with execution(model, policy):
        for width in widths:
            cache.crop(reference.first)
            for block in _blocks(layers, reference, width, cache):
                found += block
                if found.differing and not whole:
                    return found
    return found


def _blocks(layers: DecoderLayers, reference: Reference, width: int, cache: KVCache) -> Iterator[Agreement]:
    """Blocks of one width, each compared in its logits and in the keys and values it wrote."""
    for start in range(0, len(reference.logits) - width + 1, width):
        first = reference.first + start
        hidden = layers.embed(reference.token_ids[:, start : start + width], first)
        logits = layers.logits(layers.run(hidden, 0, layers.num_layers, first, cache))[0]
        expected = torch.cat(reference.logits[start : start + width])
        same = (logits == expected).all(-1)
        for index, layer in enumerate(reference.cache.layers):
            for mine, stock in zip(cache.rows(index, first), (layer.keys, layer.values), strict=True):
                assert stock is not None
                same &= (mine == stock[:, :, first : first + width])[0].all(-1).all(0).to(same.device)
        shift = float((logits.float() - expected.float()).abs().max())
        yield Agreement(width, width - int(same.sum()), shift)
