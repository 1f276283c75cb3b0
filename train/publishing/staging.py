"""Copy an adapter into a folder for publishing, and check that others can use it and that it has nothing private.

Only the files named here are published. Weights, evidence, traces and plots are copied byte for byte. Config,
provenance and card are written again without paths of this machine.
"""

import getpass
import json
import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from runtime.adapter.config import SpecBoundConfig
from runtime.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from runtime.errors import AdapterError
from runtime.fields import parse_object
from train.calibration.traces import HELD_OUT_FILE, TRACES_FILE
from train.evaluation.report import markdown
from train.publishing.card import card
from train.publishing.contents import (
    BENCH_FILE,
    CALIBRATION_FILE,
    CARD_FILE,
    CUSTOM_GENERATE,
    RUN_FILE,
    SPEED_FILE,
    write_custom_generate,
)
from train.replay.agreement import agrees
from train.settings.source import ENDINGS

# Files that are copied unchanged, if they exist.
COPIED = [WEIGHTS_FILE, CALIBRATION_FILE, SPEED_FILE, TRACES_FILE, HELD_OUT_FILE, "costs.json"]
COPIED += [f"{name}.png" for name in ("reliability", "precision", "speed", "sources")]

OURS = {*COPIED, BENCH_FILE, CONFIG_FILE, RUN_FILE, CARD_FILE, CUSTOM_GENERATE.as_posix()}

# Settings that only name local paths or the repository, and do not affect the adapter.
PLACES = ("output_dir", "corpus_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id")
FILE_LISTS = ("prompts", "evaluation_files")

SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b|PRIVATE KEY-----")
# A path begins with a slash, but one after a word, slash, colon or dot is part of a name, URL or unit.
LOCAL_PATH = re.compile(r"(?<![\w/:.])/(?!/)[\w.+-]+/[\w.+/-]*|\b[A-Za-z]:\\[\w.]+|(?<!\w)~[/\\]\w|\bfile://")


@dataclass(frozen=True, slots=True)
class Claims:
    """What the publisher states about an adapter, in place of what its config says; None keeps the config's value.

    Attributes:
        bench: report of `specbound bench` for the card; None takes the folder's `bench.json`, if it exists.
    """

    base_model: str | None = None
    base_revision: str | None = None
    license: str | None = None
    bench: Path | None = None


def stage(folder: Path, target: Path, repo_id: str, claims: Claims) -> SpecBoundConfig:
    """Write the files to publish into an empty folder; returns the config.

    Raises:
        AdapterError: the adapter is incomplete or cannot be published. The message gives all reasons in one line.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load_adapter(folder).config
    given: dict[str, Any] = {"base_model_name_or_path": claims.base_model, "base_model_revision": claims.base_revision}
    given["license"] = claims.license
    if claims.base_model is not None and claims.base_revision is None:
        config = replace(config, base_model_revision=None)  # the old commit belongs to another repository
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    if claims.bench is not None and not claims.bench.is_file():
        raise AdapterError(f"{claims.bench} is no file: expected a report of `specbound bench`")
    calibrated, speed = _read(folder / CALIBRATION_FILE), _read(folder / SPEED_FILE)
    bench = _read(claims.bench or folder / BENCH_FILE)
    faults = [str(entry.message) for entry in caught if issubclass(entry.category, UserWarning)]
    faults += [*_identity_faults(config), *_evidence_faults(config, calibrated), *_bench_faults(config, bench)]
    if faults:
        raise AdapterError(f"{folder} cannot be published: {'; '.join(faults)}")
    assert calibrated is not None
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    (target / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    if bench is not None:  # without the records, and with the base's public name
        bench["settings"]["base_model"] = config.base_model_name_or_path
        bench.pop("records", None)
        (target / BENCH_FILE).write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")
    (target / CARD_FILE).write_text(card(config, calibrated, speed, bench, repo_id=repo_id), encoding="utf-8")
    if (folder / RUN_FILE).is_file():
        run = _public_run((folder / RUN_FILE).read_text(encoding="utf-8"), config.base_model_name_or_path)
        (target / RUN_FILE).write_text(run, encoding="utf-8")
    write_custom_generate(target)
    load_adapter(target)
    names = [repo_id, config.base_model_name_or_path, *calibrated.get("datasets", [])]
    if leaks := [f"{path.name}: {what}" for path in published(target) for what in _private(path, names)]:
        raise AdapterError(f"{folder} cannot be published, it would reveal {'; '.join(leaks)}: remove that")
    return config


def published(target: Path) -> list[Path]:
    """List the files of a staged folder."""
    return sorted(path for path in target.rglob("*") if path.is_file())


def _read(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None if there is no such file."""
    try:
        return parse_object(path.read_text(encoding="utf-8"), path.name) if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None


def _identity_faults(config: SpecBoundConfig) -> Iterable[str]:
    """Yield reasons why others could not find the base or may not use the adapter."""
    name, revision = config.base_model_name_or_path, config.base_model_revision
    remedy = "say which Hub repository and commit it is with --base-model ORG/NAME --base-revision COMMIT"
    if base_is_local(name):
        yield f"its base is {name!r}, a folder of this machine: {remedy}"
    elif revision is None:
        yield f"it names no revision of its base {name}: {remedy}"
    elif not re.fullmatch("[0-9a-f]{40}", revision):
        yield f"the revision of its base is {revision!r}, expected a commit (40 hexadecimal digits): {remedy}"
    if config.license is None:
        yield "it states no licence: give one, such as --license apache-2.0"


def base_is_local(name: str) -> bool:
    """Whether a base's name is a folder, or not a valid name of a Hub repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return Path(name).exists()


def _evidence_faults(config: SpecBoundConfig, calibrated: dict[str, Any] | None) -> Iterable[str]:
    """Yield reasons why the calibration figures cannot be trusted."""
    if calibrated is None:
        yield f"it has no {CALIBRATION_FILE}, the evidence of its calibration: fit it again"
        return
    try:
        exits = {int(layer) for layer in calibrated["exits"]}
        shares = [exit_[name] for exit_ in calibrated["exits"].values() for name in ("agreement", "ece_after")]
        whole = exits == set(config.exit_layers) and all(0 <= share <= 1 for share in shares)
        whole = whole and calibrated["positions"] > 0 and calibrated["replay"]["mean_accepted_length"] >= 1
        same = agrees(calibrated["agreement"])
        card(config, calibrated)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        yield f"its {CALIBRATION_FILE} is not whole ({type(error).__name__}: {error}): fit it again"
        return
    if not whole:
        yield f"its {CALIBRATION_FILE} is of other exits, or holds impossible figures: fit it again"
    if not same:
        agreement = calibrated["agreement"]
        yield (
            f"its measured and predicted acceptance disagree, {agreement['by_run']} and {agreement['by_replay']}"
            " tokens a round on the same text, so none of its figures can be trusted: fit it again, and report this"
        )


def _bench_faults(config: SpecBoundConfig, bench: dict[str, Any] | None) -> Iterable[str]:
    """Yield reasons why a benchmark does not describe this adapter."""
    if bench is None:
        return
    try:
        markdown(bench)
        same, complete = bench["adapter_sha256"] == config.weights_sha256, bench["complete"]
        runs = [methods["specbound"] for methods in (*bench["by_task"].values(), bench["methods"])]
        exact = all(run["identical_prompts"] == run["prompts"] > 0 for run in runs)
        bench["settings"]["base_model"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield f"its {BENCH_FILE} is no report of `specbound bench` on SpecBound ({type(error).__name__}: {error})"
        return
    if not same:
        yield f"its {BENCH_FILE} is of other heads: run `specbound bench` on this adapter"
    if not complete:
        yield f"its {BENCH_FILE} was cut short: `specbound bench --resume` ends it"
    if not exact:
        yield f"its {BENCH_FILE} has prompts with other ids than stock's: report this"


def _public_run(text: str, base: str) -> str:
    """Return the provenance with the base's public name and with names of files instead of their paths."""
    try:
        run = yaml.safe_load(text)
        settings = {name: value for name, value in run["settings"].items() if name not in PLACES}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise AdapterError(f"{RUN_FILE} is damaged: fit the adapter again, or remove that file") from None
    settings["model_name_or_path"] = base
    for name in FILE_LISTS:
        if isinstance(settings.get(name), list):
            settings[name] = [_file_name(str(source)) for source in settings[name]]
    return yaml.safe_dump(run | {"settings": settings}, sort_keys=True)


def _file_name(source: str) -> str:
    path = source.partition("?")[0]
    is_file = path.removesuffix(".gz").endswith(ENDINGS) or "\\" in path or path.count("/") > 1
    return re.split(r"[/\\]", source)[-1] if is_file else source


def _private(path: Path, names: list[str]) -> Iterable[str]:
    """Yield the kinds of private data in a file; `names` are public, even if they resemble a user's name."""
    data = path.read_bytes()
    token = get_token()
    if SECRET.search(data) or (token and token.encode() in data):
        yield "a token or key"
    if len(home := str(Path.home())) > 1 and home.encode() in data:
        yield f"the folder {home}"
    if path.suffix not in (".json", ".yaml", ".md"):
        return
    text = data.decode("utf-8")
    for name in names:
        text = text.replace(name, "")
    if match := LOCAL_PATH.search(text):
        yield f"the path {json.dumps(match[0])}"
    user = re.escape(_user())
    if user and re.search(rf"(?<![\w-]){user}(?=[/\\@])|(?<=[/\\]){user}(?![\w-])", text):
        yield "the user's name"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a process without a user name
        return ""
