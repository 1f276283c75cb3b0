"""What llama.cpp does with the same weights on this machine, without speculation: what a CPU user would pick instead.

Needs `pip install xllamacpp gguf`, and a GGUF file, which is rewritten with matrices in bfloat16 unless they are to
stay as they are. Its kernels are its own, and so are its ids. Example:
python scripts/measure/llama_cpp.py model.gguf question.jsonl --limit 12 --threads 2 --json llama_cpp.json
"""

import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import torch
import typer
from tqdm import tqdm

from runtime.conditions import hardware
from runtime.files import write_atomic
from runtime.text.prompts import read_prompts, spread


def main(
    model: Annotated[Path, typer.Argument(help="GGUF file.")],
    prompts: Annotated[str, typer.Argument(help="File of prompts.")],
    limit: Annotated[int | None, typer.Option(min=1, help="This many, spread over the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    as_it_is: Annotated[bool, typer.Option(help="Keep the file's own quantisation.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Time greedy answers, print the medians, keep the figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = model if as_it_is else in_bfloat16(model, Path(folder) / "bfloat16.gguf")
        timings = [answer(server, prompt, max_new_tokens) for server, prompt in served(path, prompts, limit, threads)]
    figures = {
        "hardware": hardware(torch.device("cpu")),
        "threads": threads,
        "weights": model.name if as_it_is else f"{model.name}, matrices in bfloat16",
        "versions": f"xllamacpp {version('xllamacpp')}",
        "prompts": len(timings),
        "max_new_tokens": max_new_tokens,
        "tokens_per_second": median(timings, "predicted_per_second"),
        "prompt_tokens_per_second": median(timings, "prompt_per_second"),
    }
    print(json.dumps(figures, indent=1))
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


def in_bfloat16(source: Path, target: Path) -> Path:
    """The same model with every quantised matrix dequantised and rounded to bfloat16."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    bfloat16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, bfloat16), raw_dtype=bfloat16)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def served(path: Path, prompts: str, limit: int | None, threads: int) -> Any:
    """One server, and each prompt for it."""
    import xllamacpp  # in no extra of ours: this script alone wants it

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 4096, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    for prompt in tqdm(spread(read_prompts(prompts), limit), "llama.cpp", unit="prompt"):
        yield server, [{"role": message.role, "content": message.content} for message in prompt.messages[:1]]


def answer(server: Any, messages: list[dict[str, str]], max_new_tokens: int) -> dict[str, float]:
    """What the server says of its own time for one greedy answer."""
    options = {"max_tokens": max_new_tokens, "temperature": 0.0, "cache_prompt": False}
    timings: dict[str, float] = server.handle_chat_completions({"messages": messages, **options})["timings"]
    return timings


def median(timings: list[dict[str, float]], name: str) -> float:
    """Over answers."""
    return round(statistics.median(timing[name] for timing in timings), 2)


if __name__ == "__main__":
    typer.run(main)
