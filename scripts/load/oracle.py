"""`Oracle`: what stock `generate` answers to a request, alone, on a copy of the model without SpecBound.

Prompts, grammars and penalties are made by the server's own code; options of `generate`, seeds, stop strings and
probabilities are put together here, from what docs/serving.md says.
"""

from types import SimpleNamespace
from typing import Any

import torch
from questions import NUM_TOP, Body, Question, Text
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from runtime.server.grammar import GrammarMask
from runtime.server.penalties import CountPenalties
from runtime.server.request.prompts import Prompt, prompts_of
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.text.transcript import ends_of

LOWEST = -9999.0  # what JSON has for the logarithm of 0


class Noted(LogitsProcessor):
    """Keeps logarithms of probabilities [V] at each position; changes nothing."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] at the next position."""
        self.rows.append(torch.log_softmax(scores[0].float(), dim=-1))
        return scores


class Oracle:
    """Answers alone.

    Args:
        model: of transformers, as it is.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        assert not hasattr(model, "specbound")
        self.model, self.tokenizer = model, tokenizer
        self.ends = set(ends_of(model))

    def answer(self, question: Question) -> list[Text]:
        """All answers to a question."""
        body = {"model": "oracle", **question.body}
        request = (ChatRequest if question.is_chat else CompletionRequest).model_validate(body)
        worker: Any = SimpleNamespace(model=self.model, tokenizer=self.tokenizer)
        (prompt,) = prompts_of(worker, request)
        return [self._text(prompt, question.body, number) for number in range(question.body.get("n", 1))]

    def _text(self, prompt: Prompt, body: Body, number: int) -> Text:
        """The answer of that number."""
        ends = set() if body.get("ignore_eos") else self.ends
        noted, processors = Noted(), list[LogitsProcessor]()
        if "presence_penalty" in body:
            presence, frequency = body["presence_penalty"], body["frequency_penalty"]
            processors.append(CountPenalties(prompt.num_tokens, presence=presence, frequency=frequency))
        if prompt.grammar is not None:
            processors.append(GrammarMask(prompt.grammar, prompt.num_tokens))
        processors.append(noted)
        torch.manual_seed(body.get("seed", 0) + number)
        found = self.model.generate(
            prompt.ids,
            attention_mask=torch.ones_like(prompt.ids),
            logits_processor=LogitsProcessorList(processors),
            eos_token_id=sorted(ends) or [self.model.config.get_text_config().vocab_size],
            **options_of(body),
        )
        ids = found[0, prompt.num_tokens :].tolist()
        text = Text(self.decode(ids), ids, "stop" if ids[-1] in ends else "length")
        if body.get("logprobs"):
            chat = "messages" in body
            text.logprobs = [self._likely(row, token, chat) for row, token in zip(noted.rows, ids, strict=True)]
        return text

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def cut(self, text: Text, stops: list[str]) -> None:
        """End a text at the stop string that is complete first, the longest of those."""
        assert text.ids is not None
        for length in range(1, len(text.ids) + 1):
            shown = self.decode(text.ids[:length])
            found = [(shown.find(stop) + len(stop), shown.find(stop)) for stop in stops if stop in shown]
            if found:
                text.ids, text.text, text.reason = text.ids[:length], shown[: min(found)[1]], "stop"
                text.logprobs = text.logprobs[:length]
                return

    def _likely(self, row: Tensor, token: int, chat: bool) -> tuple[float, dict[str, float]]:
        """The logarithm of a token's probability, and of the likeliest by their text."""
        best = row.topk(NUM_TOP)
        pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        pairs += [] if chat else [(token, float(row[token]))]
        return finite(float(row[token])), by_text([(self.tokenizer.decode([id]), value) for id, value in pairs])


def options_of(body: Body) -> dict[str, Any]:
    """Of `generate`, from a request's fields."""
    options: dict[str, Any] = {"max_new_tokens": body["max_tokens"], "do_sample": body["temperature"] != 0}
    if options["do_sample"]:
        options |= {"temperature": body["temperature"], "top_p": body["top_p"]}
    if "repetition_penalty" in body:
        options["repetition_penalty"] = body["repetition_penalty"]
    if "min_tokens" in body:
        options["min_new_tokens"] = body["min_tokens"]
    if "logit_bias" in body:
        options["sequence_bias"] = [[[int(id)], float(value)] for id, value in body["logit_bias"].items()]
    return options


def by_text(pairs: list[tuple[str, float]]) -> dict[str, float]:
    """Values by text, in falling order; of those that look the same, the first."""
    found: dict[str, float] = {}
    for text, value in pairs:
        found.setdefault(text, finite(value))
    return found


def finite(value: float) -> float:
    """As JSON has it."""
    return max(value, LOWEST)


def spoil(model: Any) -> str:
    """Let one Linear add the two halves of its inputs apart, for a negative control; its name."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    name, linear = linears[len(linears) // 2]

    def halves(module: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        middle = module.in_features // 2
        first = nn.functional.linear(given[0][..., :middle], module.weight[:, :middle], module.bias)
        return first + nn.functional.linear(given[0][..., middle:], module.weight[:, middle:])

    linear.register_forward_hook(halves)
    return name
