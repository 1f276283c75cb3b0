"""`AttentionHead`: an exit head with one small attention layer over the positions so far, with keys of its own.

It reads what the base knew one position earlier: its verified top state there; after a draft, where there is none yet,
the head's own state at the position before stands in its place (the idea of EAGLE, arXiv 2401.15077 and 2503.01840).
Both are in one space: the base's rows make logits of either. Knows no policy, no cache and no file.

Shape suffixes: T rows (any shape before it), R rows of a step, T of which draft, S past keys, D hidden size, H query
heads, G key heads, E head size, V draft vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.drafting.exit_head import MAX_AGE, NONE, VERIFIED, ExitHead, HeadContext
from runtime.drafting.unembedding import DraftUnembedding
from runtime.drafting.unrolled import unrolled

HEAD_SIZE = 64
# Rotary angles turn once in 2 pi to nearly 2 pi times this many positions.
LONGEST_TURN = 10_000.0
# Where its fit starts: of what the base's norm multiplies numbers by, those smaller than this share of the median are
# not undone; and the other states are mixed in with weights so much smaller than usual.
SMALLEST_SCALE, OTHERS_AT_START = 0.25, 0.1
# Drafts of a round that it learns to make, at every position.
FIT_DRAFTS = 3


class AttentionHead(ExitHead):
    """Mixes the hidden state, the embedding and the state of the position before; attends; then a gated block.

    Attributes:
        num_heads, num_key_heads, head_size: H, G and E.
    """

    ages = (*range(1, MAX_AGE + 1), MAX_AGE + 2)  # the last for all further drafts
    attends = True

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__(hidden_size, draft_vocab_size, rank)
        self.num_heads = max(1, hidden_size // HEAD_SIZE)
        fewer = [count for count in range(1, self.num_heads // 3 + 1) if self.num_heads % count == 0]
        self.num_key_heads = max(fewer, default=1)
        self.head_size = min(HEAD_SIZE, hidden_size // 2 * 2)
        width, key_width = self.num_heads * self.head_size, self.num_key_heads * self.head_size
        self.hidden_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.embedding_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.deep_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.gate_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.source = nn.Parameter(torch.zeros(3, hidden_size))
        self.mix = nn.Linear(3 * hidden_size, hidden_size, bias=False)
        self.query_key_value = nn.Linear(hidden_size, width + 2 * key_width, bias=False)
        self.attention_out = nn.Linear(width, hidden_size, bias=False)
        self.gate_up = nn.Linear(hidden_size, 2 * rank, bias=False)
        self.down = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.down.weight)

    @torch.no_grad()
    def start(self, unembedding: DraftUnembedding) -> None:
        """Pass the state of the position before on: the base's norm makes of it what it was.

        Of a state of random numbers it would make logits that are far too large where it scales numbers differently,
        most of all on Gemma, and many steps would go into making them smaller.
        """
        scale = unembedding.norm_scale.float()
        inverse = torch.where(scale.abs() > SMALLEST_SCALE * scale.abs().median(), 1.0 / scale, 0.0)
        self.mix.weight *= OTHERS_AT_START
        self.mix.weight[:, -self.hidden_size :] = functional.normalize(inverse, dim=0).diag() * self.hidden_size**0.5

    def step(
        self,
        states: tuple[Tensor, Tensor, Tensor],
        source: Sequence[int],
        positions: Sequence[int],
        keys: Tensor,
        values: Tensor,
        held: int,
        settled: int,
        paths: Sequence[Sequence[int]],
        unembedding: DraftUnembedding,
    ) -> Tensor:
        """States [T, D] of the last T of R rows, normed as the base's are; keys and values of all are put into place.

        Args:
            states: of the rows, each of shape [R, D]: hidden states at the exit, hidden states at depth 0, and the
                normed state at the position before: the base's, this method's own, or 0.
            source: which of these the last is, of each row: `VERIFIED`, `OWN` or `NONE`.
            positions: place of each row in its text.
            keys, values: of the rows before, shape [G, S, E], with room for these.
            held: how many there are; these follow.
            settled: keys that all T rows see, the first ones.
            paths: of each of the T rows, the places of the others that it sees, counted from there; the last its own.
        """
        device, stop = keys.device, held + len(source)
        mixed, queries, own_keys, own_values = self.read(
            *states, torch.tensor(source, device=device), torch.tensor(positions, device=device)
        )
        keys[:, held:stop], values[:, held:stop] = own_keys, own_values
        seen = torch.zeros(len(paths), stop, dtype=torch.bool)
        seen[:, :settled] = True
        for row, path in enumerate(paths):
            seen[row, [settled + place for place in path]] = True
        attended = functional.scaled_dot_product_attention(
            queries[None, :, -len(paths) :],
            keys[None, :, :stop],
            values[None, :, :stop],
            attn_mask=seen.to(device),
            enable_gqa=True,
        )[0]
        return unembedding.normalize(self.write(mixed[-len(paths) :], attended))

    def read(
        self, hidden: Tensor, embedding: Tensor, deep: Tensor, source: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What goes into the attention: mix [T, D], queries [H, T, E], keys and values [G, T, E]; see `step`."""
        dtype = self.mix.weight.dtype  # while fitting, heads are float32 on a base of any dtype
        before = self.deep_norm(deep.to(dtype)) + self.source[source]
        parts = [self.hidden_norm(hidden.to(dtype)), self.embedding_norm(embedding.to(dtype)), before]
        mixed = self.mix(torch.cat(parts, dim=-1))
        joined = self.query_key_value(self.attention_norm(mixed)).unflatten(-1, (-1, self.head_size)).transpose(-2, -3)
        queries, keys, values = joined.split([self.num_heads, self.num_key_heads, self.num_key_heads], dim=-3)
        angles = _angles(positions[..., None, :], self.head_size)
        return mixed, _rotated(queries, angles), _rotated(keys, angles), values

    def write(self, mixed: Tensor, attended: Tensor) -> Tensor:
        """State [T, D] before the base's norm, from the mix [T, D] and what was attended to [H, T, E]."""
        mixed = mixed + self.attention_out(attended.transpose(-2, -3).flatten(-2))
        gate, up = self.gate_up(self.gate_norm(mixed)).chunk(2, dim=-1)
        widened: Tensor = mixed + self.down(functional.silu(gate) * up)
        return widened

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V]; [A, N, V] for A ages.

        Args:
            hidden: states at the exit, shape [B, S, D] of whole texts; [N, D] where the context has none: then each
                token is taken for the first of its text.
        """
        if context.texts is None:
            source = torch.where(context.age == 1, VERIFIED, NONE)
            rows = hidden, context.embedding, context.deep, source, torch.zeros_like(source)
            mixed, queries, _, values = self.read(*rows)
            attended = values.repeat_interleave(queries.shape[-3] // values.shape[-3], dim=-3)
            return unembedding(self.write(mixed, attended))
        last = max(MAX_AGE if bool((context.age == 0).any()) else 0, int(context.age.max()))
        states = torch.stack(unrolled(self, hidden, context.texts, unembedding, steps=last))
        chosen = context.texts.chosen
        offset = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)[chosen]
        # No more drafts were made before a position than it has response positions before it.
        step = torch.where(context.age == 0, last, context.age).minimum(offset + 1) - 1
        return unembedding.of_normed(states[:, chosen][step, torch.arange(len(offset), device=step.device)])

    @property
    def fit_flops(self) -> int:
        """As `ExitHead.fit_flops`, of all drafts that are learnt; without scores, and without prompt positions."""
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
        return FIT_DRAFTS * (6 * (matrices - self.source.numel()) + 4 * self.draft_vocab_size * self.hidden_size)

    @property
    def kept_numbers(self) -> int:
        """As `ExitHead.kept_numbers`, of all drafts that are learnt; without scores, and without prompt positions."""
        width = self.query_key_value.out_features + self.attention_out.in_features
        return FIT_DRAFTS * (14 * self.hidden_size + 3 * width + 4 * cast(int, self.rank))


def turns(number: int, head_size: int) -> Tensor:
    """Cosines, then sines, of so many positions' rotary angles, shape [number, E], float32."""
    angles = _angles(torch.arange(number), head_size)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _angles(positions: Tensor, head_size: int) -> Tensor:
    """Rotary angles [..., E / 2] of positions [...]."""
    half = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    return positions[..., None].float() * LONGEST_TURN ** (-half / head_size)


def _rotated(states: Tensor, angles: Tensor) -> Tensor:
    """States [T, E] turned by angles [T, E / 2] in float32."""
    cosine, sine = angles.cos(), angles.sin()
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(states.dtype)
