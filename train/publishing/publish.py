"""Publish an adapter to the Hub in a single commit."""

import tempfile
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from runtime.adapter.folder import load_adapter
from runtime.adapter.hub import TRANSPORT_ERROR
from runtime.base import check_base, load_model, load_tokenizer
from runtime.errors import AdapterError, ConfigError, SpecBoundError, one_line
from train.publishing.staging import Claims, base_is_local, stage
from train.publishing.upload import Published, Upload
from train.settings.fit_config import FitConfig


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    claims: Claims | None = None,
    token: str | None = None,
) -> Published:
    """Publish a copy of an adapter's folder, then download it and compare it with what was sent.

    Args:
        repo_id: `ORG/NAME`; created if it does not exist.
        create_pr: open a pull request instead of committing.
        revision: branch, created if it does not exist; None is `main`.
        tag: set on the commit.
        claims: base, revision and licence, if the adapter's config lacks them or names a local folder.
        token: Hub token; None takes the token of the login.

    Raises:
        ConfigError: the arguments exclude each other, or `repo_id` is not a valid name.
        AdapterError: the adapter cannot be published, the repository holds something else or was changed meanwhile,
            the Hub refused or failed, or the download differs from what was sent.
    """
    check_repo_id(repo_id)
    if create_pr and (revision or tag):
        raise ConfigError("create_pr proposes a commit to main: leave out revision and tag")
    claims = claims or Claims()
    with tempfile.TemporaryDirectory(prefix="specbound-publish-") as scratch:
        target = Path(scratch) / "adapter"
        target.mkdir()
        stage(folder, target, repo_id, claims)
        if claims.base_model is not None or claims.base_revision is not None:
            _check_claim(target, token)
        try:
            upload = Upload(target, repo_id, revision or "main", token)
            return upload.run(private=private, create_pr=create_pr, tag=tag)
        except (TRANSPORT_ERROR, RuntimeError, ValueError, OSError) as error:
            if isinstance(error, SpecBoundError):
                raise
            raise AdapterError(
                f"{repo_id} could not be published: {_explain(error, token)}; {folder} is as it was,"
                " and the same command goes on"
            ) from None


def check_can_push(config: FitConfig) -> None:
    """Raise a ConfigError before a fit if its adapter certainly could not be published."""
    check_repo_id(str(config.hub_model_id))
    by_hand = "or publish it afterwards with `specbound publish`"
    if base_is_local(config.model_name_or_path):
        raise ConfigError(
            f"push_to_hub needs a base from the Hub, {config.model_name_or_path!r} is a folder: name the"
            f" repository, {by_hand} and --base-model"
        )
    if config.license is None:
        raise ConfigError(f"push_to_hub needs the adapter's licence: give --license, such as apache-2.0, {by_hand}")
    if get_token() is None:
        raise ConfigError(f"push_to_hub needs a login: run `hf auth login` or set HF_TOKEN, {by_hand}")


def check_repo_id(repo_id: str) -> None:
    """Raise a ConfigError unless the name is ORG/NAME and valid on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ascii(repo_id[:100])
    else:
        if repo_id.count("/") == 1:
            return
    raise ConfigError(f"{repo_id} is not the name of a Hub repository: expected ORG/NAME")


def _check_claim(target: Path, token: str | None) -> None:
    """Load the claimed base from the Hub; raises BaseModelMismatch if the adapter was not fitted on it."""
    adapter = load_adapter(target)
    name, options = adapter.config.base_model_name_or_path, {"revision": adapter.config.base_model_revision}
    options |= {"token": token}
    check_base(load_model(name, options), load_tokenizer(name, options), adapter, strict=True)


def _explain(error: Exception, token: str | None) -> str:
    """Describe an error in one line that says what to do and contains no token."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the error of the thread that sent a file
    status, message = getattr(getattr(error, "response", None), "status_code", None), one_line(error)
    if status in (401, 403):
        message = f"{message}; log in with `hf auth login`, with a token that may write there"
    for secret in (token, get_token()):
        message = message.replace(secret, "[token]") if secret else message
    return message
