"""`CostTable`: what the parts of a round cost on one machine, in milliseconds. Needs no policy and no traces.

Measured by `train.replay.profile`, or counted from the weights where nothing was measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.drafting.draft_heads import DraftHeads
from runtime.errors import DataError
from runtime.files import write_atomic
from train.features.spread import shaped
from train.features.weights import active_parameters, mixed_parameters
from train.replay.rounds import Level

FORMAT = 2
# Cost of each further row of a block, as a share of the first: weights are read once for all rows. Experts are not:
# each row wakes others, and a mixture takes a block row by row.
COUNTED_EXTRA_ROW = 0.15
WIDTHS = tuple(range(1, 17))


@dataclass(frozen=True, slots=True)
class CostTable:
    """Costs of the parts of a round.

    Attributes:
        num_hidden_layers: L.
        layer: tokens in a block -> ms of one decoder layer with an empty context.
        layer_context: tokens in a block -> ms that each token of context adds to `layer`.
        unembedding: tokens in a block -> ms of the final norm and the unembedding.
        head: ms of asking one exit head.
        head_row: ms that each further token adds, where a head is asked for several.
        lookup: ms of asking the lookup for one token.
        token: ms of choosing one token: processors, criteria, streamer.
        plain, plain_context: ms per token of stock `generate`, and what each token of context adds to it.
        round: ms of everything else in a round.
        conditions: hardware, dtype, threads, exactness, versions, numbers that the head reads which was timed; empty
            where the table was counted.
    """

    num_hidden_layers: int
    layer: Mapping[int, float]
    layer_context: Mapping[int, float]
    unembedding: Mapping[int, float]
    head: float
    lookup: float
    token: float
    plain: float
    plain_context: float
    round: float = 0.0
    head_row: float = 0.0
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def counted(cls, num_hidden_layers: int, *, head: float, unembedding: float, experts: float = 0.0) -> "CostTable":
        """Count costs from numbers of weights; the unit is one decoder layer on one token.

        Args:
            head, unembedding: cost for one token, in this unit.
            experts: share of a layer's cost for one token that is mixtures of experts.
        """
        rows = {width: 1.0 + COUNTED_EXTRA_ROW * (width - 1) for width in WIDTHS}
        return cls(
            num_hidden_layers=num_hidden_layers,
            layer={width: (1.0 - experts) * share + experts * width for width, share in rows.items()},
            layer_context=dict.fromkeys(WIDTHS, 0.0),
            unembedding={width: unembedding * share for width, share in rows.items()},
            head=head,
            head_row=COUNTED_EXTRA_ROW * head,
            lookup=0.0,
            token=0.0,
            plain=num_hidden_layers + unembedding,
            plain_context=0.0,
        )

    @classmethod
    def layer_passes(cls, num_hidden_layers: int) -> "CostTable":
        """Count only passes of a decoder layer, whatever the width; plain decoding makes L per token."""
        free = dict.fromkeys((1, 2), 0.0)
        return cls(
            num_hidden_layers=num_hidden_layers,
            layer=dict.fromkeys((1, 2), 1.0),
            layer_context=free,
            unembedding=free,
            head=0.0,
            lookup=0.0,
            token=0.0,
            plain=float(num_hidden_layers),
            plain_context=0.0,
        )

    def check_layers(self, number: int, of: str) -> None:
        """Raise DataError where the costs are of another base than one of so many layers, which is `of`."""
        if number != self.num_hidden_layers:
            raise DataError(
                f"the costs are of a base of {self.num_hidden_layers} layers, {of} has {number}: measure this one with"
                " `specbound profile`"
            )

    def for_head(self, weights_read: int) -> "CostTable":
        """The same machine with a head of another size: what it costs goes by the numbers that it reads.

        Raises:
            DataError: the table does not say how many the head has that was timed.
        """
        timed = self.conditions.get("head_weights")
        if not timed:
            raise DataError("the costs do not say which head was timed: measure them again with `specbound profile`")
        share = weights_read / timed
        conditions = {**self.conditions, "head_weights": weights_read}
        return replace(self, head=share * self.head, head_row=share * self.head_row, conditions=conditions)

    def block(self, table: Mapping[int, float], width: int) -> float:
        """Look up a width; others than those measured lie on the line through the nearest two."""
        if width in table:
            return table[width]
        widths = sorted(table)
        above = next((index for index, other in enumerate(widths) if other > width), len(widths) - 1)
        low, high = widths[max(0, above - 1)], widths[max(1, above)]
        slope = (table[high] - table[low]) / (high - low)
        return max(0.0, table[low] + slope * (width - low))

    def of_round(self, levels: Sequence[Level], last: int, requests: int = 1) -> tuple[float, float]:
        """Cost of a round without accepted drafts: ms with an empty context, and what each token of context adds.

        Of several requests with trees like this one, what they cost together: their rows run as one block, each
        request's with keys of its own.

        Example:
            With exits at 2 and 4 of 6 layers, a level before which 3 tokens came, and whose exits are asked for 3 and
            1 of them, runs 2 layers on the 3, the head at 2 on 3 rows, 2 layers on all tokens that have not passed
            them, and the head at 4 on 1 row. In the end all tokens run what they lack, and the unembedding.

        Args:
            levels: of its tree; each says how many tokens came before it, and which exits were asked for how many.
            last: tokens that came with the last level.
            requests: that decode together.
        """
        segments: list[tuple[int, int]] = []  # depth and number of a request's tokens, deepest first
        ms = of_context = 0.0
        for level in levels:
            _push(segments, 0, level.tokens)
            ms += self.lookup * level.lookups * requests
            for layer, rows in level.asked:
                fixed, slope = self._climb(segments, layer, requests)
                ms, of_context = ms + fixed + self.head + self.head_row * (requests * rows - 1), of_context + slope
        _push(segments, 0, last)
        total = requests * sum(tokens for _, tokens in segments)
        fixed, slope = self._climb(segments, self.num_hidden_layers, requests)
        once = self.round + self.token * requests
        return once + ms + fixed + self.block(self.unembedding, total), of_context + slope

    def _climb(self, segments: list[tuple[int, int]], to: int, requests: int) -> tuple[float, float]:
        """Bring every token to a depth; tokens at one depth run together. Cost as `of_round` gives it."""
        ms = of_context = 0.0
        while segments[-1][0] < to:
            depth, tokens = segments.pop()
            stop = min(to, segments[-1][0]) if segments else to
            ms += (stop - depth) * self.block(self.layer, requests * tokens)
            of_context += (stop - depth) * requests * self.block(self.layer_context, tokens)
            _push(segments, stop, tokens)
        return ms, of_context

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.conditions.items()) or "counted, not measured"
        widths = sorted(self.layer)

        def row(title: str, values: Mapping[int, float], scale: float = 1.0) -> str:
            return f"{title:<24}" + "".join(f"{scale * values[width]:9.3f}" for width in widths)

        lines = [
            where,
            f"stock generate: {self.plain:.3g} ms a token, plus {1000 * self.plain_context:.3g} per 1,000 of context",
            f"head {self.head:.3g} ms, each further token {self.head_row:.2g} ms, lookup {self.lookup:.2g} ms, "
            f"choosing a token {self.token:.2g} ms",
            f"the rest of a round {self.round:.3g} ms",
            f"{'tokens in a block':<24}" + "".join(f"{width:>9}" for width in widths),
            row("one layer, ms", self.layer),
            row("  per 1,000 of context", self.layer_context, 1000.0),
            row("unembedding, ms", self.unembedding),
        ]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the table as JSON."""
        write_atomic(path, (json.dumps(asdict(self) | {"format": FORMAT}, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "CostTable":
        """Read what `write` wrote.

        Raises:
            DataError: the file does not exist, or is not a cost table.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise ValueError("of another specbound, without what a draft tree costs")
            for name in ("layer", "layer_context", "unembedding"):
                fields[name] = {int(width): float(value) for width, value in fields[name].items()}
                if len(fields[name]) < 2:
                    raise ValueError(f"{name} has fewer than two widths")
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a cost table ({error}): measure one with `specbound profile`") from None


def counted_costs(model: Any, heads: DraftHeads) -> CostTable:
    """Count costs from weights: those of a head, the unembedding and experts, relative to one decoder layer."""
    model = shaped(model)
    layers: int = model.config.get_text_config().num_hidden_layers
    matrix = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    body = active_parameters(model) - matrix * (1 if tied else 2)
    layer = body / layers
    head = heads.exits.one.weights_read / layer
    return CostTable.counted(layers, head=head, unembedding=matrix / layer, experts=mixed_parameters(model) / body)


def _push(segments: list[tuple[int, int]], depth: int, tokens: int) -> None:
    """Add tokens at a depth; those at the depth of the last ones join them."""
    if segments and segments[-1][0] == depth:
        segments[-1] = depth, segments[-1][1] + tokens
    elif tokens:
        segments.append((depth, tokens))
