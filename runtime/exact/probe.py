"""The probe: which operations must run row by row on this machine, so that a block has the bits of plain decoding.

Compared on real activations: text the base itself continues, decoded one token at a time by the stock forward.
First every Linear, alone, at every width of block, and on numbers that tell the order of additions (`order.py`), as
attention is; then the whole model, logits and cache, under the policy found, near the beginning of a text and far into
one. What was checked and found is the certificate; it holds for one device, dtype, thread count and set of versions.
Knows nothing of drafting.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel

from runtime.decoding.cache import KVCache
from runtime.decoding.families import family_of, has_windows
from runtime.decoding.layers import DecoderLayers
from runtime.errors import UnsupportedModel, one_line
from runtime.exact.attention import NATIVE_KINDS, WINDOW_KINDS, BlockAttention, is_native
from runtime.exact.certificate import Certificate, environment, read_certificate, write_certificate
from runtime.exact.execution import ExecutionPolicy, Shape, execution, native_layers, prompt_layers
from runtime.exact.fingerprint import digest as running_digest
from runtime.exact.linear_rows import linear_rows, packed_rows
from runtime.exact.native.attend import can_attend
from runtime.exact.native.layout import NATIVE
from runtime.exact.native.stack import norms as native_norms
from runtime.exact.order import kind_in_order, kind_sums, same_norm, windows_like
from runtime.exact.packed import PackedLinears
from runtime.exact.reference import Reference
from runtime.exact.static import StaticCache

# Raised with every change of how blocks are computed or compared: certificates on disk are of that alone.
PROBE_FORMAT = 29
# Tokens of prompts that are read both ways.
PROMPTS = (9, 45, 150)


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
    key = {**where, "base": fingerprint, "attention": model.config.get_text_config()._attn_implementation}
    key |= {"max_width": max_width, "exactness": exactness, "packed": _layouts(packed)}
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
    """Find and confirm the cheapest policy, or measure the batched one; see `certify`.

    Raises:
        UnsupportedModel: the model's own forward fails.
    """
    started = time.perf_counter()
    try:
        near = Reference.near(model)
        far = Reference.far(model, near)
    except Exception as error:  # of the model's own forward, whatever it is: stock's loop will meet it again, or not
        raise UnsupportedModel(f"its own forward could not be probed: {one_line(error)}") from error
    widths = range(2, max_width + 1)
    whole = exactness == "batched"
    policies = _batched(packed, static) if whole else _candidates(model, near, packed, widths, static)
    agreement = Agreement()
    policy = policies[0]
    for policy in policies:
        agreement = compare(model, near, policy, widths, packed=packed, whole=whole)
        if far is not None and (agreement.differing == 0 or whole):
            agreement += compare(model, far, policy, sorted({2, max_width} & set(widths)), packed=packed, whole=whole)
        if agreement.differing == 0:
            break
    bitwise = agreement.differing == 0
    if bitwise and policy.native:
        run = prompt_layers(model, policy, packed)
        policy = replace(policy, prompts=run is not None and run.keeps_bits(model, near.token_ids, PROMPTS))
    return Certificate(
        bitwise=bitwise,
        max_width=max_width if bitwise or whole else 1,
        longest_context=(far or near).length,
        policy=policy,
        rows_checked=agreement.rows,
        rows_differing=agreement.differing,
        largest_shift=agreement.largest_shift,
        native=[shape for shape, name in _layouts(packed) if name == NATIVE and shape in policy.packed_rows],
        seconds=round(time.perf_counter() - started, 2),
        **environment(model),
    )


def _layouts(packed: PackedLinears | None) -> list[tuple[Shape, str]]:
    """Shape of packed Linears and the name of the kernel that multiplies them, sorted."""
    return [] if packed is None else sorted({(joint.shape, joint.layout.name) for joint in packed.joint})


def _batched(packed: PackedLinears | None, static: bool) -> list[ExecutionPolicy]:
    """The one policy of `batched`: nothing by rows; static, or everything packed that can be."""
    if static:
        return [replace(ExecutionPolicy.batched(), static=True)]
    joint: dict[Shape, int | None] = {} if packed is None else {joint.shape: None for joint in packed.joint}
    return [replace(ExecutionPolicy.batched(), packed_rows=joint, fused=bool(joint))]


def _candidates(
    model: PreTrainedModel, reference: Reference, packed: PackedLinears | None, widths: Sequence[int], static: bool
) -> list[ExecutionPolicy]:
    """Policies under which every Linear, alone, has its bits; cheapest first, the last with nothing left to chance."""
    rows = linear_rows(reference, widths)
    joint = {} if packed is None else packed_rows(reference, packed, [1, *widths])
    # Attention of a whole block adds in another order everywhere; in groups, and in our kernel, on some CPUs.
    known = (*(WINDOW_KINDS if has_windows(model.config) else ()), *NATIVE_KINDS, "grouped")
    kinds = [kind for kind in known if _keeps_order(kind, model, reference, widths)] + ["rowwise"]
    policies = [ExecutionPolicy(kind, rows, packed_rows=joint) for kind in kinds]
    fused = [replace(policy, fused=True) for policy in policies] if joint else []
    native = [replace(policy, native=True) for policy in fused if _runs_native(model, policy, packed)]
    plain = [ExecutionPolicy("rowwise", rows)] if joint else []
    segments = [ExecutionPolicy("batched", rows, static=True), ExecutionPolicy("batched", other_rows=1, static=True)]
    return [*(segments if static else []), *native, *fused, *policies, *plain, ExecutionPolicy.rowwise()]


def _runs_native(model: PreTrainedModel, policy: ExecutionPolicy, packed: PackedLinears | None) -> bool:
    """Whether our kernel takes the model's layers under this policy, and adds in its norms as they do."""
    run = native_layers(model, policy, packed, BlockAttention(policy.attention, "sdpa"))
    if run is None:
        return False
    by_size = {norm.weight.shape: norm for norm in run.norms}
    norms = partial(native_norms, weighing=run.weighing)
    return all(same_norm(norm, norms) for norm in by_size.values())


def _keeps_order(kind: str, model: PreTrainedModel, reference: Reference, widths: Sequence[int]) -> bool:
    """Whether a block's rows attend as they would alone, under a kind of attention; eager knows only its own."""
    config = model.config.get_text_config()
    stock = config._attn_implementation
    if family_of(model.config).attention is not None or family_of(model.config).masked:
        return False
    keys, values = reference.cache.layers[0].keys, reference.cache.layers[0].values
    shapes = {each.shape for layer in reference.cache.layers for each in (layer.keys, layer.values)}
    attention = BlockAttention(kind, stock)
    if stock != "sdpa" or not widths or len(shapes) > 1:
        return False
    if attention.order is not None and not can_attend(keys, keys, values, attention.order):
        return False
    heads, threads = (config.num_attention_heads, keys.shape[1], keys.shape[3]), torch.get_num_threads()
    if heads[0] % heads[1]:  # a layer's own numbers are others than the config's
        return False
    windows = [*(windows_like(config.sliding_window) if attention.filled is not None else ()), None]
    in_order = all(
        kind_in_order(kind, heads, rows, keys.dtype, keys.device, window, threads)
        for rows in sorted({1, 2, max(widths)})
        for window in windows
    )
    return in_order and (not is_native(kind) or kind_sums(f"native_{attention.order}", heads[2], threads))


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
    if policy.static or is_native(policy.attention):  # one row alone is not plain decoding's own call either
        widths = [1, *widths]
    agreement = Agreement()
    with execution(model, policy, packed):
        for width in widths:
            cache.crop(reference.first)
            for block in _blocks(layers, reference, width, cache):
                agreement += block
                if agreement.differing and not whole:
                    return agreement
    return agreement


def _blocks(layers: DecoderLayers, reference: Reference, width: int, cache: KVCache) -> Iterator[Agreement]:
    """Blocks of one width, each compared in its logits and in the keys and values it wrote."""
    for start in range(0, len(reference.logits) - width + 1, width):
        first, ids = reference.first + start, reference.token_ids[:, start : start + width]
        block = layers.embed(ids, first), 0, layers.num_layers, first, cache
        logits = layers.logits(layers.run(*block, tokens=ids[0].tolist()))[0]
        expected = torch.cat(reference.logits[start : start + width])
        same = (logits == expected).all(-1)
        for index, layer in enumerate(reference.cache.layers):
            for mine, stock in zip(cache.rows(index, first), (layer.keys, layer.values), strict=True):
                assert stock is not None
                same &= (mine == stock[:, :, first : first + width])[0].all(-1).all(0).to(same.device)
        shift = float((logits.float() - expected.float()).abs().max())
        yield Agreement(width, width - int(same.sum()), shift)
