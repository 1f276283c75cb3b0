"""The planner against what is measured: parameters and operations exactly, memory of a step, disk; the recipes."""

import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.attention_head import FIT_DRAFTS
from runtime.drafting.heads import HEAD_KINDS, attends
from runtime.errors import ConfigError
from tests.helpers.families import prompt, tiny
from tests.helpers.paths import ROOT
from train.cli.app import app
from train.features.disk import bytes_per_position
from train.features.extractor import FeatureExtractor
from train.features.weights import active_parameters
from train.fit_exits import make_heads
from train.fitting.flops import FitFlops, peak_flops
from train.fitting.losses import Targets, distillation_loss
from train.planning.hours import Devices
from train.planning.plan import empty_heads, estimate, position_bytes, recipe_for, step_memory
from train.planning.shapes import KNOWN, empty_model
from train.settings.fit_config import FitConfig

RECIPES = sorted((ROOT / "configs" / "fit").glob("*.yaml"))
MEASURED = {"hidden_size": 192, "intermediate_size": 512, "vocab_size": 3000, "num_attention_heads": 4}
BATCH, PROMPT, RESPONSE = 4, 40, 60
# As the models' own cards and files count them.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
    "google/gemma-3-270m": 268_098_176,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "codellama/CodeLlama-13b-Instruct-hf": 13_016_028_160,
}


def tiny_config(**changes) -> FitConfig:
    settings = {"model_name_or_path": "-", "prompts": ["-"], "output_dir": "-", "exit_layers": [2, 4], "head_rank": 64}
    settings |= {"draft_vocab_size": 1000, "per_device_train_batch_size": BATCH, "dtype": "float32"}
    return FitConfig(**settings | {"max_new_tokens": RESPONSE, "max_length": PROMPT + RESPONSE} | changes)


@pytest.fixture(scope="module")
def base(make_model):
    return make_model(**MEASURED)


def step(config, base):
    """Tensors of a step: a function that does one as the learner does, and the heads."""
    layers = DecoderLayers(base.requires_grad_(False))
    heads = make_heads(config, layers, torch.arange(config.draft_vocab_size))
    kept = PROMPT if attends(config.head) else 0
    extract = FeatureExtractor(layers, config.exit_layers, top_k=config.teacher_top_k, prompt_tokens=kept)
    rows = [([5] * PROMPT, [7] * RESPONSE)] * BATCH

    def run():
        features = extract(rows)
        targets = Targets.of(features.target, features.top_ids, features.top_log_probs, heads.target_to_draft)
        logits = heads(features.hidden, features.context(range(1, FIT_DRAFTS + 1) if kept else None)).values()
        drafts = [draft for each in logits for draft in (each if kept else [each])]
        torch.stack([distillation_loss(draft, targets, kl_weight=0.5) for draft in drafts]).mean().backward()
        return features

    return run, heads.exits


def peak_bytes(run) -> int:
    """The most that tensors made in `run` took at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_bases_are_exact(name):
    assert sum(parameter.numel() for parameter in empty_model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_parameters_of_a_fit_are_exact(tiny_base, make_adapter, make_model, head):
    empty = empty_model(str(tiny_base))
    model = make_model()
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in model.parameters())
    config = tiny_config(head=head, head_rank=8, draft_vocab_size=64)
    found = estimate(config, empty, Devices(1, 80), num_prompts=10, prompt_tokens=8)
    assert found.head_parameters == sum(p.numel() for p in make_adapter(model, head=head).heads.parameters())


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_operations_are_those_that_torch_counts(make_model, head):
    base = make_model(**MEASURED)
    config = tiny_config(head=head)
    base.set_attn_implementation("eager")  # torch counts no other on a CPU
    run, heads = step(config, base)
    flops = FitFlops.of(base, heads)
    with FlopCounterMode(display=False) as counted:
        run()
    length = PROMPT + RESPONSE
    # torch counts attention over all pairs of the padded block, masked or not.
    expected = flops.base(BATCH * length, BATCH * RESPONSE, BATCH * length * length) + flops.heads(BATCH * RESPONSE)
    # Scores, and keys of the prompt's positions, are left out.
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.15 if attends(head) else 0.01)


@pytest.mark.parametrize("head", HEAD_KINDS)
@pytest.mark.parametrize("draft", [100, 3000])
def test_memory_of_a_step_is_within_a_quarter(base, head, draft):
    config = tiny_config(head=head, draft_vocab_size=draft)
    run, heads = step(config, base)
    run()  # gradients are there from here on
    planned = step_memory(config, base, heads, length=PROMPT + RESPONSE, responses=RESPONSE)
    del planned["draft rows"]
    assert peak_bytes(run) == pytest.approx(sum(planned.values()), rel=0.25)


def test_disk_of_cached_features_is_exact(base):
    config = tiny_config()
    run, _ = step(config, base)
    assert bytes_per_position(run()) == position_bytes(config, base)


def test_a_base_larger_than_a_device_is_spread_or_refused():
    config = recipe_for("meta-llama/Llama-3.3-70B-Instruct")
    base = empty_model(config.model_name_or_path)
    found = estimate(config, base, Devices.parse("8x80"), num_prompts=1000, prompt_tokens=100)
    assert found.sharded and found.generation == 0
    assert 70.55e9 * 2 / 8 < found.memory["base"] < 70.55e9 * 2 / 8 + 10e9
    with pytest.raises(ConfigError, match=r"needs [\d.]+ of 24 GiB on each device with its base spread over 2"):
        estimate(config, base, Devices.parse("2x24"), num_prompts=1000, prompt_tokens=100)


def test_more_devices_take_less_time_and_more_epochs_more():
    base = empty_model("Qwen/Qwen3-8B")

    def hours(gpus, **changes):
        config = FitConfig(model_name_or_path="-", prompts=["-"], output_dir="-", exit_layers=[4], **changes)
        found = estimate(config, base, Devices.parse(gpus), num_prompts=1000, prompt_tokens=100)
        return found.fit_hours, found.corpus_hours

    one, eight = hours("1x80"), hours("8x80")
    assert one == pytest.approx(tuple(8 * value for value in eight))
    assert hours("1x80", num_train_epochs=6)[0] == pytest.approx(2 * one[0])
    assert hours("1x80", features="cache")[0] < one[0] / 2


@pytest.mark.parametrize("text", ["8", "8x", "x80", "0x80", "8x0", "eight"])
def test_devices_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="expected NUMBERxGIB, such as 8x80"):
        Devices.parse(text)


def test_devices_are_known_by_the_longest_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("some accelerator") is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_read_strictly_and_says_what_the_planner_says(path):
    text = path.read_text(encoding="utf-8")
    named = recipe_for(str(path)).model_name_or_path
    base = empty_model(named)
    config = recipe_for(str(path), base)
    if "# Plan for " not in text:
        return  # planned, and made for a machine without a GPU
    gpus = text.split("# Plan for ")[1].split(":")[0]
    found = estimate(config, base, Devices.parse(gpus), num_prompts=100_000, prompt_tokens=200)
    memory = max(found.total_memory, found.generation) / 2**30
    assert (
        f"# Plan for {gpus}: {memory:.0f} GiB, corpus {found.corpus_hours:.1f} h, fit {found.fit_hours:.1f} h" in text
    )
    assert empty_heads(config, base).exit_layers == config.exit_layers


def test_the_command_line(tiny_base):
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", "--model", str(RECIPES[0]), "--gpus", "8x80"])
    assert shown.exit_code == 0 and "times the base's forward" in shown.output
    printed = runner.invoke(app, ["plan", "--model", str(tiny_base), "--gpus", "1x1", "--json"])
    found = json.loads(printed.output)
    assert found["base_parameters"] > 0 and math.isfinite(found["fit_hours"])
    wrong = runner.invoke(app, ["plan", "--model", "no/such", "--gpus", "8x80"])
    assert wrong.exit_code == 1 and "no config of 'no/such'" in wrong.output


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "solar_open", "gemma4_text with inputs of each layer"])
def test_bases_that_name_their_sizes_otherwise(family, tmp_path):
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    plan = estimate(tiny_config(), empty_model(str(tmp_path)), Devices(1, 80), num_prompts=10, prompt_tokens=8)
    assert plan.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.total_memory > 4 * plan.base_parameters


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_token_is_counted_with_the_experts_that_take_it(family):
    base = tiny(family, attention="eager")
    base.set_experts_implementation("eager")
    flops = FitFlops.of(base, empty_heads(tiny_config(draft_vocab_size=90), base))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        base(prompt(20))
    assert counted.get_total_flops() == pytest.approx(flops.base(20, 20, 20 * 20), rel=0.01)


def test_active_parameters_of_a_mixture_are_exact():
    base = empty_model("Qwen/Qwen3-30B-A3B")
    assert active_parameters(base) == 3_353_032_704
    assert active_parameters(tiny("llama")) == sum(parameter.numel() for parameter in tiny("llama").parameters())
    shown = CliRunner().invoke(app, ["plan", "--model", "Qwen/Qwen3-30B-A3B", "--gpus", "8x80"])
    assert "base 30,532,122,624" in shown.output and "3,353,032,704 of them for a token of text" in shown.output
