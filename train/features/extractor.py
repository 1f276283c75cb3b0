"""What a head learns from: hidden states at the exits and the base's own choice, at response positions.

One forward of the frozen base gives all of them. Needs no heads and no losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.heads import HeadContext
from runtime.errors import DataError

CHUNK = 512
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
    """

    hidden: dict[int, Tensor]
    embedding: Tensor
    deep: Tensor
    target: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    lengths: list[int]

    def context(self, age: int | None = None, *, turn: int = 0) -> HeadContext:
        """What heads read besides hidden states, with a verified state that is `age` positions old.

        Args:
            age: one age for all positions, 0 for no verified state; by default it varies with position and `turn`.
        """
        offset = torch.cat([torch.arange(length) for length in self.lengths]).to(self.deep.device)
        pattern = torch.tensor(AGE_PATTERN if age is None else [age], device=self.deep.device)
        ages = pattern[(offset + turn) % len(pattern)]
        ages = torch.where(ages <= offset, ages, 0)  # nothing is drafted before the response
        positions = torch.arange(len(offset), device=self.deep.device) - ages
        deep = torch.where((ages > 0)[:, None], self.deep[positions], 0)
        return HeadContext(self.embedding, deep, ages)

    @classmethod
    def join(cls, parts: Sequence["Features"]) -> "Features":
        """Concatenate the sequences of several features."""
        hidden = {layer: torch.cat([part.hidden[layer] for part in parts]) for layer in parts[0].hidden}
        names = [field.name for field in fields(cls) if field.name not in ("hidden", "lengths")]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(hidden=hidden, lengths=[length for part in parts for length in part.lengths], **tensors)

    def to(self, device: torch.device | str) -> "Features":
        """The same features on another device."""
        hidden = {layer: tensor.to(device) for layer, tensor in self.hidden.items()}
        names = [field.name for field in fields(self) if field.name not in ("hidden", "lengths")]
        return Features(
            hidden=hidden, lengths=self.lengths, **{name: getattr(self, name).to(device) for name in names}
        )

    def split(self) -> list["Features"]:
        """Split into the features of each sequence."""
        names = [field.name for field in fields(self) if field.name not in ("hidden", "lengths")]
        pieces = {name: getattr(self, name).split(self.lengths) for name in names}
        hidden = {layer: tensor.split(self.lengths) for layer, tensor in self.hidden.items()}
        return [
            Features(
                hidden={layer: tensors[index] for layer, tensors in hidden.items()},
                lengths=[length],
                **{name: pieces[name][index] for name in names},
            )
            for index, length in enumerate(self.lengths)
        ]


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
    """

    def __init__(self, layers: DecoderLayers, exit_layers: Sequence[int], *, top_k: int) -> None:
        self.layers = layers
        self.exit_layers = list(exit_layers)
        self.top_k = top_k

    @torch.no_grad()
    def __call__(self, rows: Sequence[tuple[list[int], list[int]]]) -> Features:
        """Features of (prompt ids, response ids) rows, on the base's device."""
        device = self.layers.device
        texts = [torch.tensor([*prompt, *response]) for prompt, response in rows]
        input_ids = pad_sequence(texts, batch_first=True).to(device)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).to(device)
        chosen = torch.zeros_like(mask)
        for index, (prompt, response) in enumerate(rows):
            chosen[index, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
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
        deep = top.last_hidden_state[chosen]
        target, ids, log_probs = self._teacher(deep)
        return Features(
            hidden={depth: taken[depth] for depth in self.exit_layers},
            embedding=taken[0],
            deep=deep,
            target=target,
            top_ids=ids,
            top_log_probs=log_probs,
            lengths=[len(response) for _, response in rows],
        )

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
