"""What a head learns from: hidden states at the exits and the base's own choice, at response positions.

One forward of the frozen base gives all of them. Needs no heads and no losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.exit_head import HeadContext, WholeTexts
from runtime.errors import DataError
from train.features import states
from train.features.lengths import alike
from train.features.prompts import Prompts, whole_texts
from train.features.spread import is_spread

CHUNK = 512
TOP = -1  # in the place of a depth: above all layers
# Ages of the verified state in fitting and calibration, used in turn: about as frequent as they are in drafting.
AGE_PATTERN = (1, 1, 2, 1, 1, 3, 1, 2, 4, 0)


@dataclass(frozen=True, slots=True)
class Features:
    """N response positions of some sequences, in order.

    Attributes:
        hidden: exit layer -> hidden states, shape [N, D], the base's dtype.
        embedding: hidden states at depth 0, shape [N, D].
        deep: the base's last hidden states, after the final norm, shape [N, D].
        target: the base's most likely next token, shape [N], int64.
        top_ids: its most likely next tokens, shape [N, K], int64.
        top_log_probs: their log-probabilities under the whole vocabulary, shape [N, K], float32.
        lengths: positions of each sequence, summing to N.
        prompts: the positions before, for heads that attend; None for others.
    """

    hidden: dict[int, Tensor]
    embedding: Tensor
    deep: Tensor
    target: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    lengths: list[int]
    prompts: Prompts | None = None

    def context(self, age: int | Sequence[int] | None = None, *, turn: int = 0) -> HeadContext:
        """What heads read besides hidden states, with a verified state that is `age` positions old.

        Args:
            age: one age for all positions, 0 for no verified state; several for as many drafts of each position; by
                default it varies with position and `turn`.
        """
        each = [self._verified(one, turn) for one in age] if isinstance(age, Sequence) else [self._verified(age, turn)]
        deep, ages = (torch.stack(parts) for parts in zip(*each, strict=True))
        if not isinstance(age, Sequence):
            deep, ages = deep[0], ages[0]
        return HeadContext(self.embedding, deep, ages, self.texts)

    def _verified(self, age: int | None, turn: int) -> tuple[Tensor, Tensor]:
        """Newest verified state [N, D] and its age [N] at every position, see `context`."""
        offset = torch.cat([torch.arange(length) for length in self.lengths]).to(self.deep.device)
        pattern = torch.tensor(AGE_PATTERN if age is None else [age], device=self.deep.device)
        ages = pattern[(offset + turn) % len(pattern)]
        known = torch.where(ages <= offset, ages, 0)  # nothing is drafted before the response
        positions = torch.arange(len(offset), device=self.deep.device) - known
        deep = torch.where((known > 0)[:, None], self.deep[positions], 0)
        return deep, known if self.prompts is None else ages  # whole texts say where a response begins

    @property
    def texts(self) -> WholeTexts | None:
        """The whole texts; None where no prompts were kept."""
        if self.prompts is None:
            return None
        return whole_texts(self.prompts, self.hidden, self.embedding, self.deep, self.lengths)

    @classmethod
    def join(cls, parts: Sequence["Features"]) -> "Features":
        """Concatenate the sequences of several features."""
        joined: Features = states.join(parts)
        return joined

    def to(self, device: torch.device | str) -> "Features":
        """The same features on another device."""
        moved: Features = states.change(self, lambda tensor: tensor.to(device))
        return moved

    def split(self) -> list["Features"]:
        """Split into the features of each sequence."""
        return states.split(self)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Prompt and response of each row, cut to a length; rows left without a response token are dropped.

    Attributes:
        rows: (prompt ids, response ids) of each row kept.
        num_dropped: rows dropped.
    """

    rows: list[tuple[list[int], list[int]]]
    num_dropped: int

    @classmethod
    def from_corpus(cls, dataset: Any, *, max_length: int, name: str) -> "Sequences":
        """Cut the rows of a corpus split to a length.

        Args:
            dataset: rows with `prompt_ids` and `response_ids`.
            max_length: maximum tokens of prompt and response together; the right end is cut.
            name: name of the split, for messages.

        Raises:
            DataError: nothing is left.
        """
        cut = [(row["prompt_ids"], row["response_ids"][: max_length - len(row["prompt_ids"])]) for row in dataset]
        kept = [row for row, full in zip(cut, dataset, strict=True) if row[1] and len(full["prompt_ids"]) < max_length]
        if not kept:
            raise DataError(
                f"no assistant text is left in the {name} split after truncation to {max_length} tokens: "
                "raise max_length or give shorter prompts"
            )
        return cls(kept, len(cut) - len(kept))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self.rows[index]


class FeatureExtractor:
    """Runs the frozen base and keeps what heads learn from, with hooks at the exits.

    Args:
        layers: the base.
        exit_layers: where hidden states are taken.
        top_k: K, the number of the base's most likely tokens to keep.
        prompt_tokens: the prompt positions just before a response to keep too; 0 for none, and no `prompts`.
    """

    def __init__(
        self, layers: DecoderLayers, exit_layers: Sequence[int], *, top_k: int, prompt_tokens: int = 0
    ) -> None:
        self.layers = layers
        self.exit_layers = list(exit_layers)
        self.top_k, self.prompt_tokens = top_k, prompt_tokens
        self.spread = is_spread(layers.model)  # processes must then run it equally often, whatever their texts

    def __call__(self, rows: Sequence[tuple[list[int], list[int]]]) -> Features:
        """Features of (prompt ids, response ids) rows, on the base's device; texts of like lengths run together."""
        groups = [] if self.spread else alike([len(prompt) + len(response) for prompt, response in rows])
        if len(groups) < 2:
            return self._together(rows)
        parts: dict[int, Features] = {}
        for group in groups:
            parts |= dict(zip(group, self._together([rows[index] for index in group]).split(), strict=True))
        return Features.join([parts[index] for index in range(len(rows))])

    @torch.no_grad()
    def _together(self, rows: Sequence[tuple[list[int], list[int]]]) -> Features:
        """Of rows in one forward, padded to the longest."""
        device = self.layers.device
        texts = [torch.tensor([*prompt, *response]) for prompt, response in rows]
        input_ids = pad_sequence(texts, batch_first=True).to(device)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).to(device)
        chosen = torch.zeros_like(mask)
        before = [min(self.prompt_tokens, len(prompt) - 1) for prompt, _ in rows]
        for index, (prompt, response) in enumerate(rows):
            chosen[index, len(prompt) - 1 - before[index] : len(prompt) + len(response) - 1] = True
        taken = self._run(input_ids, mask, chosen)
        kept = {depth: _parted(tensor, before, rows) for depth, tensor in taken.items()}
        exits, (embeddings, deep) = self.exit_layers, (kept[0], kept[TOP])
        target, ids, log_probs = self._teacher(deep[1])
        return Features(
            hidden={depth: kept[depth][1] for depth in exits},
            embedding=embeddings[1],
            deep=deep[1],
            target=target,
            top_ids=ids,
            top_log_probs=log_probs,
            lengths=[len(response) for _, response in rows],
            prompts=Prompts({depth: kept[depth][0] for depth in exits}, embeddings[0], deep[0], before)
            if self.prompt_tokens
            else None,
        )

    def _run(self, input_ids: Tensor, mask: Tensor, chosen: Tensor) -> dict[int, Tensor]:
        """Hidden states at the chosen positions by depth: 0, the exits, and `TOP` for the last ones."""
        taken: dict[int, Tensor] = {}
        hooks = [
            self.layers.layers[depth - 1].register_forward_hook(
                lambda module, args, output, depth=depth: taken.__setitem__(depth, _tensor(output)[chosen])
            )
            for depth in self.exit_layers
        ]
        hooks.append(
            self.layers.layers[0].register_forward_pre_hook(
                lambda module, args, kwargs: taken.__setitem__(0, _input(args, kwargs)[chosen]),
                with_kwargs=True,
            )
        )
        try:
            top = self.layers.body(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return taken | {TOP: top.last_hidden_state[chosen]}

    def _teacher(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choice and top-k distribution from the last normed states [N, D]; one chunk of logits at a time."""
        ids, log_probs = [], []
        for chunk in normed.split(CHUNK):
            logits = self.layers.unembedding(chunk).float() / self.layers.logits_scaling
            best = logits.topk(min(self.top_k, logits.shape[-1]))
            ids.append(best.indices)
            log_probs.append(best.values - logits.logsumexp(-1, keepdim=True))
        top_ids = torch.cat(ids)
        return top_ids[:, 0], top_ids, torch.cat(log_probs)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _parted(
    states: Tensor, before: Sequence[int], rows: Sequence[tuple[list[int], list[int]]]
) -> tuple[Tensor, Tensor]:
    """Prompt positions and response positions of states that hold both, text by text."""
    sizes = [size for number, (_, response) in zip(before, rows, strict=True) for size in (number, len(response))]
    pieces = states.split(sizes)
    return torch.cat(pieces[::2]), torch.cat(pieces[1::2])
