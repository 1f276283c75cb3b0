"""What several test files share: a tiny seeded base, a tiny tokenizer, an adapter. No network."""

import atexit
import os
import shutil
import tempfile
import time

# Before huggingface_hub is imported, which reads them once. Processes of a test run share certificates and kernels.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="specbound-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import constants
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runtime import SpecBoundConfig, SpeculationBounds, TemperatureSchedule, save_adapter
from runtime.adapter.folder import Adapter
from runtime.adapter.identity import base_fingerprint, tokenizer_fingerprint
from runtime.drafting.heads import ExitHeads
from runtime.exact import reference
from tests.helpers.graphs.fake_cuda import pretend
from tests.helpers.hub.loopback_hub import loopback_hub
from tests.helpers.hub.server import TOKEN, LoopbackHub
from tests.helpers.speculation import NEW_TOKENS, PROMPT

# Tiny tensors: on a busy machine, threads that wait for one another take ten times as long.
torch.set_num_threads(1)


# Files that take minutes with few tests: begun first, so that no process waits for another at the end.
LONG = (
    "test_fit_processes",
    "test_metamorphic",
    "test_native_changes",
    "test_smollm2",
    "test_checkpoints",
    "test_resume",
    "test_measure",
    "test_families",
    "test_windows",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in that order; the others as they were."""
    order = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


# Tokens that a probe looks at, in all tests but those of the probe itself: most of their time goes there.
SHORT = {"PROMPT_TOKENS": 12, "PROBE_TOKENS": 16, "FAR_TOKENS": 8}
WHOLE = {name: getattr(reference, name) for name in SHORT}


@pytest.fixture(scope="session", autouse=True)
def short_probes() -> Iterator[None]:
    """Probes of shorter texts than a user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, tokens in SHORT.items():
            patch.setattr(reference, name, tokens)
        yield


@pytest.fixture
def whole_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes as a user has them."""
    for name, tokens in WHOLE.items():
        monkeypatch.setattr(reference, name, tokens)


@pytest.fixture(params=["twin", "recorded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Segments run as they are, or are recorded and replayed."""
    if request.param == "recorded":
        pretend(monkeypatch)
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """`make_model(seed=0, **llama_config)`: a new random Llama, float32, in eval mode.

    6 layers of width 32 and 128 token ids; generation never ends early (no end token). Its weights are large,
    so that greedy output wanders and does not repeat one token.
    """

    def make(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """A tiny Llama whose greedy output wanders."""
    return make_model()


@pytest.fixture(scope="module")
def plain(model: Any) -> list[int]:
    """Its plain greedy tokens after the prompt."""
    found: list[int] = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)[0, 7:].tolist()
    assert len(set(found)) > 12
    return found


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(size=128, prefix="w")`: whole words `<pad> </s> <unk> w0 w1 ...`, split at spaces."""

    def make(size: int = 128, prefix: str = "w") -> PreTrainedTokenizerFast:
        words = ["<pad>", "</s>", "<unk>"]
        words += [f"{prefix}{number}" for number in range(size - len(words))]
        vocabulary = {word: index for index, word in enumerate(words)}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    return make


@pytest.fixture(scope="session")
def make_adapter(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., Adapter]:
    """`make_adapter(model, tokenizer=None, **config)`: an adapter for `model` with random heads, unsaved.

    Exits after layers 2 and 4; keywords replace fields of its `SpecBoundConfig` (`exit_layers`, `head`,
    `draft_vocab_size`, `bounds`, ...). The bounds accept any confidence, so that every round drafts.
    Heads draft 64 of the 128 ids, drawn at random.
    """

    def make(model: Any, tokenizer: Any = None, seed: int = 0, **changes: Any) -> Adapter:
        layers = changes.get("exit_layers", (2, 4))
        fields: dict[str, Any] = {
            "base_model_name_or_path": "some-org/tiny-base",
            "base_model_revision": None,
            "base_model_fingerprint": base_fingerprint(model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer or make_tokenizer()),
            "num_hidden_layers": model.config.num_hidden_layers,
            "hidden_size": model.config.hidden_size,
            "vocab_size": model.config.vocab_size,
            "exit_layers": layers,
            "head": "deep",
            "head_rank": 8,
            "draft_vocab_size": 64,
            "temperatures": TemperatureSchedule.linear(0.5, list(layers), model.config.num_hidden_layers),
            "bounds": SpeculationBounds(exit_threshold=0.0, max_exit_layer=layers[-1], max_draft_tokens=4),
            "weights_sha256": "",
            "license": "apache-2.0",
        }
        config = SpecBoundConfig(**fields | changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = ExitHeads(
                config.head,
                config.exit_layers,
                hidden_size=config.hidden_size,
                draft_vocab_size=config.draft_vocab_size,
                rank=config.head_rank,
            )
            for parameter in heads.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            chosen = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
        return Adapter(config, heads.requires_grad_(False).eval(), chosen)

    return make


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, make_model, make_tokenizer) -> Path:
    """Folder of a saved tiny Llama with its tokenizer, which has no chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its state in class attributes; a fit in the same process must not see another's."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def demo_outputs(tmp_path, make_model, make_tokenizer, make_adapter) -> Path:
    """A folder that looks like the repository after the demo, with a tiny base in the real one's place."""
    base = "outputs/base/smollm2-135m-instruct"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / base)
    model = make_model()
    model.save_pretrained(tmp_path / base)
    adapter = make_adapter(model, tokenizer, base_model_name_or_path=base)
    for folder in ("outputs/demo/adapter", "adapters/smollm2-135m-instruct"):
        save_adapter(adapter, tmp_path / folder)
    return tmp_path


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LoopbackHub]:
    """A Hub on the loopback that runs as long as the tests."""
    with loopback_hub() as hub:
        yield hub


@pytest.fixture
def hub(hub_server, monkeypatch) -> Iterator[LoopbackHub]:
    """The server, empty, with the client of this process pointed at it; what it sleeps is noted and not slept."""
    hub_server.restart()
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.slept = []
    monkeypatch.setattr(time, "sleep", hub_server.slept.append)
    disable_progress_bars()
    yield hub_server
    enable_progress_bars()
    close_session()
