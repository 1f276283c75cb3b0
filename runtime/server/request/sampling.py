"""`Sampling`: how tokens are chosen and what ends the answer; the same in chats, completions and responses."""

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from runtime.server.request.ranges import Bias, MinP, Seed, Stop, StopIds, Temperature, TopK, TopP
from runtime.server.request.strict import Strict


class Sampling(Strict):
    """What every body may say of it.

    Attributes:
        seed: gives the ids that `torch.manual_seed(seed)` and `model.generate` give.
        temperature: 0 is greedy; None, with no `top_p`, `top_k` or `min_p` either, does as the model's own defaults
            say.
        top_k: not OpenAI's; 0 and -1 switch off the 50 that transformers takes by default.
        min_p, repetition_penalty: not OpenAI's; as `generate` has them.
        min_tokens: vLLM's; what would end the answer is not taken before it has so many.
        stop_token_ids: vLLM's; each ends the answer, beside the model's own.
        ignore_eos: vLLM's; the model's own do not end the answer.
        logit_bias: added to the scores of token ids.
        presence_penalty: taken from the scores of ids that the answer has already.
        frequency_penalty: the same, once for each time.
    """

    seed: Seed | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: StopIds = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float = Field(0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Bias = Field(default_factory=dict)

    def sampling(self) -> dict[str, Any]:
        """Options of `generate`; those not asked for are left to it."""
        options: dict[str, Any] = {}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.min_tokens:
            options["min_new_tokens"] = self.min_tokens
        if self.logit_bias:
            options["sequence_bias"] = [[[int(id)], float(value)] for id, value in self.logit_bias.items()]
        if self.temperature == 0:
            return options | {"do_sample": False}
        top_k = 0 if self.top_k == -1 else self.top_k
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": top_k, "min_p": self.min_p or None}
        given = {name: value for name, value in asked.items() if value is not None}
        if self.min_p == 0 and given:
            given["min_p"] = 0.0  # against a model's own default
        return options | ({"do_sample": True} | given if given else {})

    def ends(self, own: Iterable[int]) -> set[int]:
        """Ids that end the answer; `own` are the model's."""
        return {*self.stop_token_ids, *(() if self.ignore_eos else own)}
