"""`GivenAnswerer`: answers of the data in the place of the base's own, and how many tokens the base would choose."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from runtime.text.encode import encode
from runtime.text.prompts import Message, Prompt
from train.corpus.answers import Answerer, Told, Turn
from train.corpus.conversation import Conversation
from train.corpus.options import CorpusOptions


class GivenAnswerer(Answerer):
    """An `Answerer` that generates nothing. Answers are cut to `max_new_tokens`, as generated ones are.

    Args:
        given: the conversations whose prompts will be asked; of equal prompts the first counts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: CorpusOptions,
        given: Sequence[Conversation],
        *,
        together: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, replace(options, sample_fraction=0.0), together=together)
        self.given = {conversation.prompt.hash: conversation for conversation in reversed(given)}

    def answer(self, batch: Sequence[Turn], *, name: str, told: Told | None = None) -> list[list[int]]:
        """The response ids of each turn; nothing is drawn, so `name` does not matter, nor is `told` called."""
        return [self._response(turn)[: self.options.max_new_tokens] for turn in batch]

    def reply(self, turn: Turn, response_ids: Sequence[int]) -> str:
        """The given answer whole, of which the response may be a part."""
        asked = (len(turn.messages) - len(turn.prompt.messages)) // 2  # later turns so far
        return self.given[turn.prompt.hash].answers[asked]

    def _response(self, turn: Turn) -> list[int]:
        """What the template makes of the answer; where it writes the prompt otherwise then, the answer by itself."""
        if self.given[turn.prompt.hash].whole:
            ids: list[int] = self.tokenizer(turn.messages[0].content)["input_ids"]
            return ids[1:]
        answer = self.reply(turn, [])
        if self.options.chat_template != "none":
            messages = [asdict(message) for message in (*turn.messages, Message("assistant", answer))]
            ids = encode(self.tokenizer, messages, options={"add_generation_prompt": False})
            begin, response = ids[: len(turn.prompt_ids)], self._until_eos(ids[len(turn.prompt_ids) :])
            if begin == turn.prompt_ids and response and response[-1] in self.eos_ids:
                return response
        own = self.tokenizer.eos_token_id  # a template's end of a turn, where a base has several
        ends = [own] if own in self.eos_ids else self.eos_ids[:1]
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], *ends]

    def _encode(self, messages: Sequence[Message], *, prompt: Prompt) -> list[int]:
        if self.given[prompt.hash].whole:  # a text without roles follows its own first token
            ids: list[int] = self.tokenizer(messages[0].content)["input_ids"]
            return ids[:1]
        return super()._encode(messages, prompt=prompt)


@torch.no_grad()
def own_tokens(model: Any, rows: Sequence[tuple[list[int], list[int]]], *, among: int = 1) -> tuple[int, int]:
    """Count response tokens that are among the base's likeliest at their places, and all of them.

    Args:
        rows: prompt ids and response ids of each text.
        among: how many of the likeliest; with 1 the base's greedy choice.
    """
    own = total = 0
    for prompt, response in rows:
        if response:
            ids = torch.tensor([[*prompt, *response]], device=model.device)
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            likely = logits.topk(min(among, logits.shape[-1])).indices
            own += int((likely == ids[0, len(prompt) :, None]).any(-1).sum())
            total += len(response)
    return own, total
