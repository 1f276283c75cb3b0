"""`Traces`: confidence and correctness of what every source would have drafted on held-out text.

The cache of an accepted prefix is exact, so confidences logged on plain text equal those that the runtime sees there.
Any policy can be replayed over them on any machine, without the model. Needs no policy and no costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runtime.drafting.lookup import LookupTable
from runtime.errors import DataError
from train.calibration.exit_log import ExitLog
from train.calibration.lookup_traces import LookupTraces

TRACES_FILE = "traces.safetensors"  # of the text that temperatures and bounds are chosen on
HELD_OUT_FILE = "held_out.safetensors"  # of text that nothing is chosen on, which the card's figures are of
LOOKUP_LAYER = 0  # the lookup needs no decoder layer
NOTHING = -2  # as a token: no draft is it


@dataclass(frozen=True, slots=True)
class Traces:
    """Drafts of every source at N positions of some texts, text after text.

    Attributes:
        layers: sources of drafts, ascending; 0 is the lookup, others are exit layers.
        confidence: calibrated confidence of each source's K likeliest drafts, shape [sources, A, K, N], float32, 0
            where there is none. The second index is the distance from the root of a round's tree; its last covers all
            greater ones. (Heads may read a verified state, which gets older with each draft.)
        rank: which of them is the base's choice, shape [sources, A, N], int8; -1 where none is.
        shared: which of them the lookup proposes as well, the same shape; -1 where none is.
        sequence: index of each position's text, shape [N], int64, from 0, not decreasing.
        context: number of tokens before each position, the prompt included, shape [N], int64.
        uncalibrated: `confidence` with every exit temperature 1; None if not logged.
        after_wrong: confidence of the lookup's next F drafts if its draft at the position is wrong, shape [F, N],
            float32; the first is for the next position. None if not logged.
    """

    layers: tuple[int, ...]
    confidence: NDArray[np.float32]
    rank: NDArray[np.int8]
    shared: NDArray[np.int8]
    sequence: NDArray[np.int64]
    context: NDArray[np.int64]
    uncalibrated: NDArray[np.float32] | None = None
    after_wrong: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        length = len(self.sequence)
        shape = (len(self.layers), *self.confidence.shape[1:3], length)
        placed = shape[:2] + shape[3:]
        steps = np.diff(self.sequence)
        if (
            length == 0
            or self.confidence.shape != shape
            or self.rank.shape != placed
            or self.shared.shape != placed
            or (self.uncalibrated is not None and self.uncalibrated.shape != shape)
            or (self.after_wrong is not None and self.after_wrong.shape != (len(self.after_wrong), length))
            or self.context.shape != (length,)
            or list(self.layers) != sorted(set(self.layers))
            or self.sequence[0] != 0
            or not bool(((steps == 0) | (steps == 1)).all())
        ):
            raise DataError(f"traces of {length} positions and {len(self.layers)} sources do not fit together")

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each source's likeliest draft is the base's choice, shape [sources, A, N]."""
        return self.rank == 0

    @property
    def num_sequences(self) -> int:
        """Number of texts."""
        return int(self.sequence[-1]) + 1

    @property
    def starts(self) -> NDArray[np.int64]:
        """First position of each text, shape [texts]."""
        return np.searchsorted(self.sequence, np.arange(self.num_sequences))

    @property
    def remaining(self) -> NDArray[np.int64]:
        """Tokens that the text still emits from each position on, that position included, shape [N]."""
        ends = np.append(self.starts[1:], len(self))
        return ends[self.sequence] - np.arange(len(self))

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        exits: ExitLog,
        lookup: tuple[LookupTraces, LookupTable] | None,
        *,
        targets: NDArray[np.int64] | None = None,
    ) -> "Traces":
        """Build traces from the logs of the exits and of the lookup over the same texts.

        Args:
            rows: prompt ids and response ids of each text.
            lookup: its log and its confidence table; None if the lookup is off.
            targets: the tokens that drafts are to be, shape [N]; by default the base's choices.
        """
        confidence, uncalibrated = exits.confidence, exits.uncalibrated
        tokens, targets = exits.tokens, exits.targets if targets is None else targets
        after_wrong = looked_up = None
        if lookup is not None:
            log, table = lookup
            looked_up = log.token
            drafted = {LOOKUP_LAYER: log.confidences(table)[:, None]}
            confidence, uncalibrated = confidence | drafted, uncalibrated | drafted
            tokens = tokens | {LOOKUP_LAYER: log.token[:, None]}
            after_wrong = log.confidences_after_wrong(table)
        lengths = np.array([len(prompt) for prompt, _ in rows])
        layers = tuple(sorted(confidence))
        rank = {layer: _place(drafts, targets) for layer, drafts in tokens.items()}
        shared = {layer: _place(drafts, looked_up) for layer, drafts in tokens.items()}
        sequence = exits.sequence
        first = np.searchsorted(sequence, np.arange(int(sequence[-1]) + 1))
        return cls(
            layers=layers,
            confidence=_stack(confidence, layers).astype(np.float32),
            rank=_stack(rank, layers),
            shared=_stack(shared, layers),
            sequence=sequence,
            context=lengths[sequence] + np.arange(len(sequence)) - first[sequence],
            uncalibrated=_stack(uncalibrated, layers).astype(np.float32),
            after_wrong=after_wrong,
        )

    def of_sequences(self, chosen: NDArray[np.bool_]) -> "Traces":
        """Select the texts marked in `chosen`, shape [texts], and renumber them from 0."""
        return self.beginnings(np.where(chosen, len(self), 0))

    def beginnings(self, lengths: NDArray[np.int64]) -> "Traces":
        """Keep at most so many positions of each text, shape [texts]; a text of which none is left goes."""
        keep = np.arange(len(self)) - self.starts[self.sequence] < lengths[self.sequence]
        numbers = np.cumsum(lengths > 0) - 1
        return Traces(
            self.layers,
            self.confidence.compress(keep, axis=-1),
            self.rank.compress(keep, axis=-1),
            self.shared.compress(keep, axis=-1),
            numbers[self.sequence[keep]],
            self.context[keep],
            None if self.uncalibrated is None else self.uncalibrated.compress(keep, axis=-1),
            None if self.after_wrong is None else self.after_wrong.compress(keep, axis=-1),
        )

    def without_temperatures(self) -> "Traces":
        """The same traces with confidences at T = 1.

        Raises:
            DataError: these confidences were not logged.
        """
        if self.uncalibrated is None:
            raise DataError("the traces have no confidences at T = 1: fit the adapter again to log them")
        return replace(self, confidence=self.uncalibrated)

    def write(self, path: Path, *, weights_sha256: str) -> None:
        """Write a safetensors file; half precision is enough for confidences.

        Args:
            weights_sha256: hash of the heads that the traces were logged with.
        """
        tensors: dict[str, NDArray[Any]] = {
            "layers": np.array(self.layers, dtype=np.int64),
            "sure": np.ascontiguousarray(self.confidence, dtype=np.float16),
            "rank": np.ascontiguousarray(self.rank),
            "shared": np.ascontiguousarray(self.shared),
            "sequence": self.sequence.astype(np.int32),
            "context": self.context.astype(np.int32),
        }
        if self.uncalibrated is not None:
            tensors["uncalibrated"] = np.ascontiguousarray(self.uncalibrated, dtype=np.float16)
        if self.after_wrong is not None:  # most positions have nothing here
            tensors["wrong"] = (some := np.flatnonzero(self.after_wrong[0])).astype(np.int32)
            tensors["after_wrong"] = np.ascontiguousarray(self.after_wrong[:, some], dtype=np.float16)
        save_file(tensors, path, metadata={"weights_sha256": weights_sha256})
        path.chmod(0o644)  # safetensors lets only the owner read it

    @classmethod
    def read(cls, path: Path, *, weights_sha256: str) -> "Traces":
        """Read what `write` wrote.

        Args:
            weights_sha256: hash of the heads that the traces must belong to.

        Raises:
            DataError: the file does not exist, is not a file of traces, or belongs to other heads.
        """
        try:
            with safe_open(path, framework="np") as file:
                heads = (file.metadata() or {}).get("weights_sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if "right" in tensors:
                raise ValueError("of an older specbound, without what a draft tree needs")
            traces = cls(
                layers=tuple(tensors["layers"].tolist()),
                confidence=tensors["sure"].astype(np.float32),
                rank=tensors["rank"],
                shared=tensors["shared"],
                sequence=tensors["sequence"].astype(np.int64),
                context=tensors["context"].astype(np.int64),
                uncalibrated=tensors["uncalibrated"].astype(np.float32) if "uncalibrated" in tensors else None,
                after_wrong=_spread(tensors) if "after_wrong" in tensors else None,
            )
        except FileNotFoundError:
            raise DataError(f"{path} is not there: fit the adapter again to log traces") from None
        except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a file of traces ({error}): fit the adapter again") from None
        if heads != weights_sha256:
            raise DataError(f"{path} belongs to the heads of another fit: fit the adapter again to log its own traces")
        return traces


def _spread(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Expand the `after_wrong` of a file to all positions."""
    spread = np.zeros((len(tensors["after_wrong"]), len(tensors["sequence"])), dtype=np.float32)
    spread[:, tensors["wrong"]] = tensors["after_wrong"]
    return spread


def _place(drafts: NDArray[np.int64], wanted: NDArray[np.int64] | None) -> NDArray[np.int8]:
    """Which of the drafts [A, K, N] is the wanted token [N], or [A, N]; -1 where none is."""
    if wanted is None:
        return np.full((drafts.shape[0], drafts.shape[2]), -1, dtype=np.int8)
    same = drafts == np.where(wanted < 0, NOTHING, wanted)[..., None, :]
    return np.where(same.any(axis=1), same.argmax(axis=1), -1).astype(np.int8)


def _stack(by_layer: Mapping[int, NDArray[Any]], layers: Sequence[int]) -> NDArray[Any]:
    """Stack to shape [sources, A, ..., N]; what holds at every distance is repeated, drafts that are missing are 0."""
    parts = [by_layer[layer] for layer in layers]
    size = max(len(part) for part in parts)
    parts = [np.broadcast_to(part, (size, *part.shape[1:])) for part in parts]
    if parts[0].ndim == 3:
        most = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, most - part.shape[1]), (0, 0))) for part in parts]
    return np.stack(parts)
