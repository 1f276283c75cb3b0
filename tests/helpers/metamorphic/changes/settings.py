"""Changes of how a model runs: dtype, threads, kernels, mode, generation config."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.helpers.metamorphic.subject import Subject


def to_another_dtype(subject: Subject) -> None:
    """float32 to bfloat16 and back."""
    subject.model.to(torch.bfloat16 if subject.model.dtype == torch.float32 else torch.float32)


def to_double(subject: Subject) -> None:
    """float64."""
    subject.model.double()


def to_half(subject: Subject) -> None:
    """float16."""
    subject.model.half()


def to_the_cpu(subject: Subject) -> None:
    """A move to where it is."""
    subject.model.to("cpu")


def other_threads(subject: Subject) -> None:
    """Two threads, or one again."""
    torch.set_num_threads(3 - torch.get_num_threads())


def eager_attention(subject: Subject) -> None:
    """The modeling file's own attention."""
    subject.model.set_attn_implementation("eager")


def sdpa_attention(subject: Subject) -> None:
    """torch's attention."""
    subject.model.set_attn_implementation("sdpa")


def _louder(*args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
    return sdpa_attention_forward(*args, scaling=(scaling or 0.3) * 1.5, **kwargs)


def own_attention(subject: Subject) -> None:
    """An attention of the user's own, registered with transformers."""
    AttentionInterface.register("own_attention", _louder)
    subject.model.set_attn_implementation("own_attention")


def train(subject: Subject) -> None:
    """Training mode: dropout."""
    subject.model.train()


def evaluate(subject: Subject) -> None:
    """Evaluation mode."""
    subject.model.eval()


def train_a_layer(subject: Subject) -> None:
    """Training mode in one layer alone."""
    subject.numbers.choice(list(subject.layers)).train()


def slow_attention_kernel(subject: Subject) -> None:
    """torch's flash kernel switched off."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    subject.restore.append(lambda: torch.backends.cuda.enable_flash_sdp(before))


def without_onednn(subject: Subject) -> None:
    """oneDNN switched off."""
    before = torch.backends.mkldnn.set_flags(False)
    subject.restore.append(lambda: torch.backends.mkldnn.set_flags(*before))


def coarse_products(subject: Subject) -> None:
    """float32 products may be rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    subject.restore.append(lambda: torch.set_float32_matmul_precision(before))


def coarse_products_of_onednn(subject: Subject) -> None:
    """The same by the setting of one backend, after which torch does not say the older one any more."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    subject.restore.append(lambda: setattr(backend, "fp32_precision", before))


def generation_config(subject: Subject) -> None:
    """Another default of `generate`."""
    name, value = subject.numbers.choice(
        [
            ("repetition_penalty", 1.3),
            ("temperature", 0.7),
            ("top_k", 9),
            ("use_cache", False),
            ("num_beams", 2),
            ("max_new_tokens", 9),
            ("eos_token_id", [7, 50]),
            ("output_hidden_states", True),
        ]
    )
    setattr(subject.model.generation_config, name, value)


def default_generation_config(subject: Subject) -> None:
    """The defaults that it came with."""
    subject.model.generation_config = type(subject.model.generation_config).from_model_config(subject.model.config)


def other_bounds(subject: Subject) -> None:
    """Longer or shorter drafts."""
    specbound = subject.model.specbound
    specbound.bounds = replace(specbound.bounds, max_draft_tokens=subject.numbers.choice([0, 1, 2, 4, 6]))


CHANGES = (
    to_another_dtype, to_double, to_half, to_the_cpu, other_threads, eager_attention, sdpa_attention, own_attention,
    train, evaluate, train_a_layer, slow_attention_kernel, without_onednn, coarse_products,
    coarse_products_of_onednn, generation_config, default_generation_config, other_bounds,
)  # fmt: skip
