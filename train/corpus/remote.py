"""`RemoteAnswerer`: answers of an engine that serves the base over HTTP, checked against the base's own tokens.

The engine implements OpenAI's completions (`POST URL/completions`), as vLLM and others do. Prompts are sent as token
ids; answers come back as text.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from runtime.errors import ConfigError, DataError
from train.corpus.answers import Answerer, Told, Turn
from train.corpus.given import own_tokens
from train.corpus.options import CorpusOptions

ATTEMPTS = 5
TIMEOUT = 600  # seconds of one batch
SAMPLE = 8  # answers compared with the base
LEAST_SHARE = 0.9
LIKELY = 50  # a sampled token is accepted as the base's own if it is among this many of its likeliest


class RemoteAnswerer(Answerer):
    """An `Answerer` that gets its answers from another engine; the model only checks a sample of them.

    Args:
        url: up to and including `/v1`. The API key is read from OPENAI_API_KEY if it is set.
    """

    def __init__(
        self, model: Any, tokenizer: Any, options: "CorpusOptions", url: str, *, together: bool = False
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"generator {url!r}: expected a URL, such as http://127.0.0.1:8000/v1")
        super().__init__(model, tokenizer, options, together=together)
        self.url = url.rstrip("/")
        self.served = ""
        self.checked: set[bool] = set()

    def answer(self, batch: Sequence[Turn], *, name: str, told: Told | None = None) -> list[list[int]]:
        """Request the response ids of each turn; an end-of-sequence token is added if the engine reports a stop.

        The engine answers at once, so `told` is not called.

        Raises:
            ConfigError: the engine cannot be reached, or refuses.
            DataError: it answers with other tokens than the base would.
        """
        sampled = batch[0].sampled
        if not self.together:
            responses = self._responses(batch, name=name)
        else:  # an engine may answer differently the second time, and all processes must check the same answer
            first = PartialState().is_main_process
            responses = broadcast_object_list([self._responses(batch, name=name) if first else None])[0]
        if sampled not in self.checked:
            self._check(batch[:SAMPLE], responses[:SAMPLE], sampled=sampled)
            self.checked.add(sampled)
        return responses

    def _responses(self, batch: Sequence[Turn], *, name: str) -> list[list[int]]:
        if not self.served:
            self.served = self._ask("models", None)["data"][0]["id"]
        sampled, options = batch[0].sampled, self.options
        request: dict[str, Any] = {"model": self.served, "prompt": [turn.prompt_ids for turn in batch]}
        request |= {"max_tokens": options.max_new_tokens, "temperature": options.temperature if sampled else 0.0}
        if sampled:
            request["top_p"] = options.top_p
        seed = hashlib.sha256(f"{options.seed} {name}".encode()).digest()
        request["seed"] = int.from_bytes(seed[:4], "big") >> 1
        choices = sorted(self._ask("completions", request)["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(batch):
            raise DataError(f"generator {self.url}: {len(choices)} answers to {len(batch)} prompts")
        return [self._ids(choice) for choice in choices]

    def _ids(self, choice: dict[str, Any]) -> list[int]:
        ids: list[int] = self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        ended = choice.get("finish_reason") == "stop" and len(ids) < self.options.max_new_tokens
        return [*ids[: self.options.max_new_tokens], *(self.eos_ids[:1] if ended else [])]

    def _check(self, batch: Sequence[Turn], responses: Sequence[list[int]], *, sampled: bool) -> None:
        """Compare each token with the base's choice at its position or, if sampled, with the base's likely tokens."""
        rows = [(turn.prompt_ids, response) for turn, response in zip(batch, responses, strict=True)]
        correct, total = own_tokens(self.model, rows, among=LIKELY if sampled else 1)
        if correct < LEAST_SHARE * total:
            raise DataError(
                f"generator {self.url} (model {self.served!r}): {100 * correct / total:.0f} % of {total} tokens are"
                f" what the base would say, expected {100 * LEAST_SHARE:.0f}: serve the same weights and tokenizer"
            )

    def _ask(self, what: str, body: dict[str, Any] | None) -> Any:
        """Send one request; retry if the engine is busy or cannot be reached."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{what}", data=data, headers=headers)
        for attempt in range(1, ATTEMPTS + 1):
            wait = float(2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code not in (408, 429) and error.code < 500:
                    break
                stated = error.headers.get("Retry-After", "")
                wait = min(float(stated), 60.0) if stated.isdecimal() else wait
            except (OSError, ValueError) as error:  # not reachable, cut off, or not JSON
                reason = str(getattr(error, "reason", error))
            if attempt < ATTEMPTS:
                time.sleep(wait)
        raise ConfigError(f"generator {self.url}: no answer to {what} ({reason}); start it, or leave --generator out")
