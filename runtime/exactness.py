"""The probe: which operations must run row by row on this machine, so that a block has the bits of plain decoding.

Compared on real activations: text the base itself continues, decoded one token at a time by the stock forward.
First every Linear, alone, at every width of block; then the whole model, logits and cache, under the policy found.
What was checked and found is the certificate; it holds for one device, dtype, thread count and set of versions.
Knows nothing of drafting.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from runtime.cache import KVCache
from runtime.execution import ExecutionPolicy, Shape, execution, linears
from runtime.layers import DecoderLayers

logger = logging.getLogger(__name__)

PROBE_FORMAT = 1
PROMPT_TOKENS = 24
TEXT_TEMPERATURE = 0.6
PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the probe checked and found.

    Attributes:
        bitwise: whether every row compared under the policy had the bits of one-token decoding.
        max_width: widest block checked, in tokens; 1 where no policy passes.
        rowwise_attention, rowwise_linears: the policy; weight shapes [out, in] of the Linears run row by row.
        rows_checked, rows_differing: rows of logits and cache compared with stock's, under the policy.
        device, dtype, threads, versions: what it holds for.
        seconds: what the probe took; 0 where it was read from disk.
    """

    bitwise: bool
    max_width: int
    rowwise_attention: bool
    rowwise_linears: tuple[Shape, ...] | None
    rows_checked: int
    rows_differing: int
    device: str
    dtype: str
    threads: int
    versions: str
    seconds: float

    @property
    def policy(self) -> ExecutionPolicy:
        """The execution it certifies."""
        shapes = None if self.rowwise_linears is None else frozenset(self.rowwise_linears)
        return ExecutionPolicy(self.rowwise_attention, shapes)

    def __str__(self) -> str:
        if self.rowwise_linears is None:
            by_row = "every Linear"
        else:
            by_row = ", ".join(f"Linear {shape[0]}x{shape[1]}" for shape in self.rowwise_linears) or "no Linear"
        attention = "attention and " if self.rowwise_attention else ""
        state = "bit for bit equal to one-token decoding" if self.bitwise else "NOT bit for bit"
        return (
            f"{state}: {self.rows_differing} of {self.rows_checked} rows differ in blocks of up to {self.max_width} "
            f"tokens; {attention}{by_row} row by row ({self.device}, {self.dtype}, {self.threads} threads, "
            f"{self.versions})"
        )


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
    stored = _read(path)
    if stored is not None:
        return stored
    with torch.autocast(model.device.type, enabled=False):
        certificate = probe(model, max_width=max_width)
    if certificate.bitwise:  # a failure is looked at anew: it may have been of the moment
        _write(path, certificate)
    return certificate


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What bits depend on besides the weights: device, dtype, threads, versions."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_processor()}"
    return {
        "device": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


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


def _processor() -> str:
    """Name of the CPU, so that a certificate is not taken to another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "model\t", "stepping", "flags")
        parts = [line for line in lines if line.startswith(wanted)]
        text = "\n".join(dict.fromkeys(parts))
        name = next((line.partition(":")[2].strip() for line in parts if line.startswith("model name")), "cpu")
        return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
    except OSError:
        return platform.processor() or platform.machine()


def _read(path: Path) -> Certificate | None:
    """A stored certificate; None where there is none that can be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        shapes = fields["rowwise_linears"]
        fields["rowwise_linears"] = None if shapes is None else tuple(tuple(shape) for shape in shapes)
        return Certificate(**(fields | {"seconds": 0.0}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, certificate: Certificate) -> None:
    """Keep a certificate; a cache folder that cannot be written only costs the next probe."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(certificate), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        logger.info("certificate not kept: %s", error)
