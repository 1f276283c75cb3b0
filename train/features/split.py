"""`Split`: the sequences of one corpus split, and access to their features. Needs no heads."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import tqdm

from runtime.adapter.identity import base_fingerprint
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.heads import attends
from train.corpus.corpus import load_split
from train.features.cache import FeatureCache
from train.features.extractor import FeatureExtractor, Features, Sequences
from train.features.prompts import PROMPT_TOKENS
from train.settings.fit_config import FitConfig

logger = logging.getLogger(__name__)

# Texts of the held-out split that judge checkpoints while a fit runs, at most half of them.
JUDGES = 64


@dataclass(slots=True)
class Split:
    """One split of the corpus; `cache` is None if features are computed when they are needed."""

    sequences: Sequences
    extract: FeatureExtractor
    cache: FeatureCache | None = None

    @classmethod
    def load(cls, config: FitConfig, layers: DecoderLayers, name: str) -> "Split":
        """Load a split of a complete corpus.

        Raises:
            DataError: the split is missing, or nothing is left of it after truncation.
        """
        sequences = Sequences.from_corpus(load_split(config.corpus_path, name), max_length=config.longest, name=name)
        if sequences.num_dropped:
            logger.info("%s: %d rows dropped, no response is left after truncation", name, sequences.num_dropped)
        kept = PROMPT_TOKENS if attends(config.head) else 0
        extract = FeatureExtractor(layers, config.exit_layers, top_k=config.teacher_top_k, prompt_tokens=kept)
        return cls(sequences, extract)

    def open_cache(self, config: FitConfig, name: str) -> FeatureCache:
        """Read features from disk from now on, once `fill_cache` has computed them; returns where."""
        settings = {
            "format": 3,
            "base": base_fingerprint(self.extract.layers.model),
            "dtype": config.dtype,
            "exits": config.exit_layers,
            "top_k": config.teacher_top_k,
            "max_length": config.longest,
            "prompt_tokens": self.extract.prompt_tokens,
            "corpus": (config.corpus_path / "corpus.json").read_text(encoding="utf-8"),
        }
        self.cache = FeatureCache(config.features_path / name, settings)
        return self.cache

    def fill_cache(self, config: FitConfig, accelerator: Accelerator, name: str) -> None:
        """Compute the features that are not on disk yet, divided over the processes; other fits wait meanwhile."""
        assert self.cache is not None
        with self.cache.lock if accelerator.is_main_process else nullcontext():
            accelerator.wait_for_everyone()  # till the main process has the lock for all
            filled = self.cache.fill(
                self.sequences,
                self.extract,
                batch_size=config.per_device_train_batch_size,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            with tqdm(total=len(self.sequences), desc=f"features {name}", unit="text") as bar:
                for done in filled:
                    bar.update(done - bar.n)
            accelerator.wait_for_everyone()

    @property
    def num_judges(self) -> int:
        """How many of the first texts may judge checkpoints; figures are told of the others alone."""
        return min(JUDGES, len(self.sequences) // 2)

    def features(self, indices: list[int]) -> Features:
        """Features of some sequences on the device, from the cache or from a forward of the base."""
        if self.cache is None:
            return self.extract([self.sequences[index] for index in indices])
        return Features.join([self.cache[index] for index in indices]).to(self.extract.layers.device)

    def batches(self, batch_size: int, *, first: int = 0, end: int | None = None) -> Iterator[Features]:
        """Features of the sequences from `first` up to `end`, in order, batch by batch; by default of all."""
        number = len(self.sequences) if end is None else min(end, len(self.sequences))
        for start in range(first, number, batch_size):
            yield self.features(list(range(start, min(start + batch_size, number))))
