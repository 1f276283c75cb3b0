"""`Speaker`: a model with its adapter that answers messages, for the verbs of the command line. Knows no terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from runtime.base import load_tokenizer
from runtime.cli.options import load_with_adapter
from runtime.errors import DataError
from runtime.text.encode import encode
from runtime.text.transcript import Round, Token, Transcript, Written, write


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model as `load_specbound` returns it, and its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, adapter: str, base_model: str | None, **options: Any) -> "Speaker":
        """Load both; options are those of `load_with_adapter`.

        Raises:
            SpecBoundError: wrong options, adapter or base.
        """
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would stand between the lines of a conversation
        model = load_with_adapter(adapter, base_model, **options)
        return cls(model, load_tokenizer(model.name_or_path, {}))

    @property
    def exit_layers(self) -> list[int]:
        """Exits that may draft, shallowest first; 0 is the lookup."""
        specbound = self.model.specbound
        layers: list[int] = specbound.bounds.exits(specbound.drafter.exit_layers)
        return layers

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def encode(self, messages: Sequence[tuple[str, str]], *, raw: bool = False) -> torch.Tensor:
        """Token ids [1, T] of messages, each a role and a text, through the chat template unless `raw`.

        Raises:
            DataError: they are no tokens, or more than fit.
        """
        ids = encode(self.tokenizer, [{"role": role, "content": text} for role, text in messages], template=not raw)
        if not 0 < len(ids) < self.context:
            raise DataError(f"the prompt is {len(ids)} tokens: this model takes 1 to {self.context - 1}")
        return torch.tensor([ids], device=self.model.device)

    def answer(
        self,
        prompt: torch.Tensor,
        listener: Callable[[Token | Round], None] = lambda event: None,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> tuple[Transcript, Written]:
        """Generate after a prompt of `encode`, cut to the model's context; options are those of `write`."""
        limit = min(max_new_tokens, self.context - prompt.shape[1])
        transcript = Transcript(self.tokenizer, stop=stop, listener=listener)
        return transcript, write(self.model, prompt, transcript, max_new_tokens=limit, **options)

    def describe(self, prompt: torch.Tensor, **options: Any) -> dict[str, Any]:
        """Answer a prompt, and all about it as JSON values."""
        transcript, written = self.answer(prompt, **options)
        return {
            "text": transcript.text,
            "tokens": transcript.ids,
            "prompt_tokens": prompt.shape[1],
            "finish_reason": written.finish_reason,
            "statistics": written.stats.to_dict(),
            "certificate": str(self.model.specbound.certificate),
        }
