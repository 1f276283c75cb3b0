"""`CorpusOptions`: what decides the text of a corpus, besides prompts and model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from train.settings.fit_config import FitConfig


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What decides the text of a corpus, besides prompts and model. Lengths are in tokens.

    `sample_fraction` of the prompts, chosen by hash, are sampled at `temperature` and `top_p`; the others are
    answered greedily. `chat_template` is `auto` (the tokenizer's own) or `none` (plain text). Prompts that
    share 13 words in a row with a text of `evaluation_files` are dropped.
    """

    max_new_tokens: int = 128
    max_prompt_tokens: int = 1024
    batch_size: int = 32
    sample_fraction: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    chat_template: str = "auto"
    calibration_fraction: float = 0.1
    held_out_fraction: float = 0.1
    evaluation_files: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, config: FitConfig, **changes: Any) -> "CorpusOptions":
        """What of a recipe decides the text of its corpus, with changes."""
        there: Mapping[str, Any] = asdict(config)
        chosen = {field.name: there[field.name] for field in fields(cls) if field.name in there}
        chosen |= {"batch_size": config.generation_batch_size, "evaluation_files": tuple(config.evaluation_files)}
        return cls(**chosen | changes)
