"""The probe: which operations must run row by row on this machine, so that a block has the bits of plain decoding.

Compared on real activations: text the base itself continues, decoded one token at a time by the stock forward.
First every Linear, alone, at every width of block; then the whole model, logits and cache, under the policy found,
near the beginning of a text and far into one. What was checked and found is the certificate; it holds for one
device, dtype, thread count and set of versions. Knows nothing of drafting.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.decoding.cache import KVCache
from runtime.decoding.layers import DecoderLayers
from runtime.exact.attention import KINDS
from runtime.exact.certificate import Certificate, environment, read_certificate, write_certificate
from runtime.exact.execution import ExecutionPolicy, Shape, execution, in_rows
from runtime.exact.fingerprint import digest as running_digest
from runtime.exact.packed import MIN_WEIGHTS, JointLinear, PackedLinears
from runtime.exact.reference import Reference
from runtime.exact.static import StaticCache

# Raised with every change of how blocks are computed or compared: certificates on disk are of that alone.
PROBE_FORMAT = 11
# Cheapest first: one call for the block, one call at a steady number of rows, one call a row.
LINEAR_ROWS = (None, 8, 16, 32, 1)


def certify(
    model: PreTrainedModel,
    fingerprint: str,
    *,
    max_width: int,
    exactness: str = "bitwise",
    packed: PackedLinears | None = None,
    static: bool = False,
) -> Certificate:
    """The cheapest policy that keeps every bit for blocks of up to `max_width` tokens, probed or read from disk.

    Args:
        fingerprint: names the base's weights; part of what a stored certificate holds for.
        max_width: `max_draft_tokens + 1`.
        exactness: with `batched` nothing is sought: the certificate says how far batched blocks are off.
        packed: of the model, used where it keeps every bit.
        static: segments of fixed shapes are used where they keep every bit, and in any case with `batched`.
    """
    where = environment(model)
    key = {**where, "base": fingerprint, "attention": model.config._attn_implementation}
    key |= {"max_width": max_width, "exactness": exactness, "packed": packed is not None}
    key |= {"static": static, "format": PROBE_FORMAT, "running": running_digest(model)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(constants.HF_HOME) / "specbound" / f"certificate-{digest}.json"
    stored = read_certificate(path)
    if stored is not None:
        return stored
    with torch.autocast(model.device.type, enabled=False):
        certificate = probe(model, max_width=max_width, exactness=exactness, packed=packed, static=static)
    if certificate.bitwise or exactness == "batched":  # a failure is looked at anew: it may have been of the moment
        write_certificate(path, certificate)
    return certificate


@torch.no_grad()
def probe(
    model: PreTrainedModel,
    *,
    max_width: int,
    exactness: str = "bitwise",
    packed: PackedLinears | None = None,
    static: bool = False,
) -> Certificate:
    """Find and confirm the cheapest policy, or measure the batched one; see `certify`."""
    started = time.perf_counter()
    near = Reference.near(model)
    far = Reference.far(model, near)
    widths = range(2, max_width + 1)
    whole = exactness == "batched"
    policies = _batched(packed, static) if whole else _candidates(near, packed, widths, static)
    agreement = Agreement()
    policy = policies[0]
    for policy in policies:
        agreement = compare(model, near, policy, widths, packed=packed, whole=whole)
        if far is not None and (agreement.differing == 0 or whole):
            agreement += compare(model, far, policy, sorted({2, max_width} & set(widths)), packed=packed, whole=whole)
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


def _batched(packed: PackedLinears | None, static: bool) -> list[ExecutionPolicy]:
    """The one policy of `batched`: nothing by rows; static, or everything packed that can be."""
    if static:
        return [replace(ExecutionPolicy.batched(), static=True)]
    joint: dict[Shape, int | None] = {} if packed is None else {joint.shape: None for joint in packed.joint}
    return [replace(ExecutionPolicy.batched(), packed_rows=joint, fused=bool(joint))]


def _candidates(
    reference: Reference, packed: PackedLinears | None, widths: Sequence[int], static: bool
) -> list[ExecutionPolicy]:
    """Policies under which every Linear, alone, has its bits; cheapest first, the last with nothing left to chance."""
    rows = linear_rows(reference, widths)
    joint = {} if packed is None else packed_rows(reference, packed, [1, *widths])
    # Attention of a whole block adds in another order; where that shows in one row of thousands, a probe may miss it.
    found = [ExecutionPolicy(kind, rows, packed_rows=joint) for kind in KINDS if kind != "batched"]
    fused = [replace(policy, fused=True) for policy in found] if joint else []
    plain = [ExecutionPolicy("rowwise", rows)] if joint else []
    segments = [ExecutionPolicy("batched", rows, static=True), ExecutionPolicy("batched", other_rows=1, static=True)]
    return [*(segments if static else []), *fused, *found, *plain, ExecutionPolicy.rowwise()]


def packed_rows(reference: Reference, packed: PackedLinears, widths: Sequence[int]) -> dict[Shape, int | None]:
    """Rows in one call of the packed Linears, by shape; shapes that have other bits than the model's are left out."""
    by_shape: dict[Shape, list[JointLinear]] = {}
    for joint in packed.joint:
        by_shape.setdefault(joint.shape, []).append(joint)
    found = {}
    for shape, joints in by_shape.items():
        recorded = [(joint, _joint_rows(reference, joint.modules)) for joint in joints]
        for rows in LINEAR_ROWS:
            if all(_same_rows(joint, given, rows, widths) for joint, given in recorded):
                found[shape] = rows
                break
    return found


def _joint_rows(reference: Reference, modules: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The recorded inputs of Linears that share them, with all their outputs side by side."""
    inputs = [given for given, _ in reference.rows[modules[0]]]
    outputs = zip(*([output for _, output in reference.rows[module]] for module in modules), strict=True)
    return [(given, torch.cat(parts, dim=-1)) for given, parts in zip(inputs, outputs, strict=True)]


def linear_rows(reference: Reference, widths: Sequence[int]) -> dict[Shape, int]:
    """Rows in one call of the Linears, by weight shape; shapes that may run as the whole block are left out."""
    by_shape: dict[Shape, list[nn.Module]] = {}
    for module in reference.rows:
        by_shape.setdefault(tuple(module.weight.shape), []).append(module)  # type: ignore[arg-type]
    found: dict[Shape, int] = {}
    for shape, modules in by_shape.items():
        # stock takes small products past oneDNN, and blocks of them not: bits then differ, too seldom for a probe
        small = modules[0].weight.dtype.itemsize == 2 and math.prod(shape) < MIN_WEIGHTS
        for rows in (1,) if small else LINEAR_ROWS:
            if rows == 1 or all(_same_rows(module, reference.rows[module], rows, widths) for module in modules):
                break
        if rows is not None:
            found[shape] = rows
    return found


def _same_rows(
    forward: Callable[..., Tensor], recorded: list[tuple[Tensor, Tensor]], rows: int | None, widths: Sequence[int]
) -> bool:
    """Whether blocks of these widths give every recorded row its own bits, with `rows` rows a call."""
    for width in widths:
        for start in range(0, len(recorded) - width + 1, width):
            given, expected = (torch.cat(part) for part in zip(*recorded[start : start + width], strict=True))
            if not torch.equal(in_rows(forward, rows)(given.unsqueeze(0))[0], expected):
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
    packed: PackedLinears | None = None,
    whole: bool = False,
) -> Agreement:
    """Decode the reference's tokens again, in blocks of each width, each block on the rows the last one left.

    Args:
        whole: go on after a block that differs, to see how far off it gets.
    """
    layers = DecoderLayers(model)
    kind = StaticCache if policy.static else KVCache
    cache = kind.from_dynamic(reference.cache, reference.length + max(widths, default=0))
    if policy.static:  # one row alone is not plain decoding's own call either
        widths = [1, *widths]
    found = Agreement()
    with execution(model, policy, packed):
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
