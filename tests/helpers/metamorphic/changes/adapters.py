"""Changes that PEFT makes."""

from typing import Any

from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.helpers.metamorphic.subject import Subject

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "gate_proj", "lm_head"],
    "qwen2": ["q_proj", "v_proj", "o_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
TARGETS |= {"qwen3": TARGETS["llama"], "granite": TARGETS["qwen2"]}


def _targets(subject: Subject) -> list[str]:
    names = TARGETS[subject.model.config.model_type]
    return subject.numbers.sample(names, subject.numbers.randint(1, len(names)))


def _config(subject: Subject, **options: Any) -> LoraConfig:
    fan = subject.model.config.model_type == "gpt2"
    rank = subject.numbers.choice([2, 4])
    names = {"target_modules": _targets(subject), "fan_in_fan_out": fan}
    return LoraConfig(r=rank, lora_alpha=16, init_lora_weights=False, **names | options)


def _add(subject: Subject, config: Any) -> None:
    if subject.lora is None:
        subject.lora = get_peft_model(subject.model, config, adapter_name="first")
    elif type(config) is not type(subject.lora.peft_config[subject.lora.active_adapter]):
        subject.nothing("adapters of two kinds")
    else:
        name = f"further{subject.numbers.randrange(1000)}"
        subject.lora.add_adapter(name, config)
        subject.lora.set_adapter(name)


def _lora(subject: Subject) -> Any:
    return subject.lora or subject.nothing("no adapter")


def add_lora(subject: Subject) -> None:
    """An adapter on some Linears, or a further one, in use from now on."""
    _add(subject, _config(subject))


def add_lora_with_dropout(subject: Subject) -> None:
    """The same, with dropout in training."""
    _add(subject, _config(subject, lora_dropout=0.2))


def add_ia3(subject: Subject) -> None:
    """An adapter that scales outputs."""
    targets = _targets(subject)
    fan = subject.model.config.model_type == "gpt2"
    _add(
        subject, IA3Config(target_modules=targets, feedforward_modules=[], fan_in_fan_out=fan, init_ia3_weights=False)
    )


def merge_adapter(subject: Subject) -> None:
    """Into the weights, through `.data`."""
    _lora(subject).merge_adapter()


def unmerge_adapter(subject: Subject) -> None:
    """Out of the weights again."""
    _lora(subject).unmerge_adapter()


def merge_and_unload(subject: Subject) -> None:
    """Into the weights, and the adapter's modules go."""
    subject.model = _lora(subject).merge_and_unload()
    subject.lora = None


def unload(subject: Subject) -> None:
    """The adapter goes, the weights stay."""
    subject.model = _lora(subject).unload()
    subject.lora = None


def set_another_adapter(subject: Subject) -> None:
    """Another of several."""
    lora = _lora(subject)
    lora.set_adapter(subject.numbers.choice(sorted(lora.peft_config)))


def delete_an_adapter(subject: Subject) -> None:
    """One of several."""
    lora = _lora(subject)
    others = [name for name in sorted(lora.peft_config) if name != lora.active_adapter]
    lora.delete_adapter(subject.numbers.choice(others or subject.nothing("only one")))


def disable_adapters(subject: Subject) -> None:
    """The base alone, its modules still wrapped."""
    _lora(subject).base_model.disable_adapter_layers()


def enable_adapters(subject: Subject) -> None:
    """With the adapter again."""
    _lora(subject).base_model.enable_adapter_layers()


def write_an_adapter(subject: Subject) -> None:
    """The adapter's own weights, through `.data`."""
    _lora(subject)
    found = [weight for name, weight in subject.model.named_parameters() if "lora_" in name or "ia3_" in name]
    weight = subject.numbers.choice(found or subject.nothing("no weights"))
    weight.data += subject.noise(weight)


def scale_an_adapter(subject: Subject) -> None:
    """How much of a LoRA is added: a number in a dict."""
    _lora(subject)
    tuned = [module for module in subject.model.modules() if isinstance(module, BaseTunerLayer)]
    tuned = [module for module in tuned if getattr(module, "scaling", None)]
    module: Any = subject.numbers.choice(tuned or subject.nothing("no LoRA"))
    for name in module.scaling:
        module.scaling[name] *= 1.5


CHANGES = (
    add_lora, add_lora, add_lora_with_dropout, add_ia3, merge_adapter, unmerge_adapter, merge_and_unload, unload,
    set_another_adapter, delete_an_adapter, disable_adapters, enable_adapters, write_an_adapter, scale_an_adapter,
)  # fmt: skip
