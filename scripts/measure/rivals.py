"""What a CPU user could run instead, beside SpecBound: llama.cpp and OpenVINO GenAI with the same weights.

All methods take turns on every prompt in one process, with the ids that transformers' chat template gives, greedy. A
GGUF file has the weights for the rivals: its matrices are dequantised, rounded to bfloat16 as those of the base are,
and written as each rival reads them. Needs `pip install gguf`, and any of llama-cpp-python, xllamacpp and
openvino-genai; what is not installed is left out, and named. Example:
python scripts/measure/rivals.py adapters/smollm2-135m-instruct model.gguf question.jsonl --limit 10 --json rivals.json
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from runtime.cli.options import load_with_adapter, to_ids
from runtime.conditions import conditions
from runtime.files import check_writable, write_atomic
from runtime.text.prompts import read_prompts, spread
from train.evaluation.methods import LOOKUP_TOKENS, Method, make_methods
from train.evaluation.report import interval

OURS = ("stock", "plain", "specbound", "prompt_lookup")
LOOKUP = " + lookup"  # after the name of a rival that drafts
NGRAM = 3  # tokens that a rival's lookup looks for
REST = 0.2  # seconds before a method, in which threads of the one before stop looking for work
WARM_UP_TOKENS = 8

Generate = Callable[[list[int], int], list[int]]  # ids of a prompt, and at most how many new ones


@dataclass(frozen=True, slots=True)
class Job:
    """What rivals are made for."""

    weights: Path
    folder: Path  # for rewritten files
    context: int  # tokens of the longest prompt, its answer, and drafts after it
    threads: int
    end: set[int]


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter.")],
    model: Annotated[Path, typer.Argument(help="GGUF file with the base's weights.")],
    prompts: Annotated[str, typer.Argument(help="File of prompts.")],
    limit: Annotated[int | None, typer.Option(min=1, help="This many, spread over the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each method on each prompt.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Time all methods in turn, print a table, keep the figures."""
    if json_file is not None:
        check_writable(json_file)
    base = load_with_adapter(adapter, None, dtype="bfloat16", threads=threads)
    ids = [one[0].tolist() for one in to_ids(base, spread(read_prompts(prompts), limit))]
    end = set(np.ravel(base.generation_config.eos_token_id).tolist())
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, Path(folder), max(map(len, ids)) + max_new_tokens + LOOKUP_TOKENS, threads, end)
        methods = {name: partial(ours, base, method) for name, method in make_methods(base, OURS).items()}
        skipped = add_rivals(methods, job)
        fixed = {
            **conditions(base.device, base.dtype),
            "rivals": {name: version(name) for name in MAKERS if name not in skipped},
            "skipped": skipped,
            "weights": model.name,
            "max_new_tokens": max_new_tokens,
        }
        for generate in methods.values():
            generate(ids[0], WARM_UP_TOKENS)
        for number, prompt in enumerate(tqdm(ids, "rivals", unit="prompt")):
            records.append(record(methods, number, runs, prompt, max_new_tokens))
            summary = {name: summarize(records, name) for name in methods}
            figures = {**fixed, "prompts": len(records), "methods": summary, "records": records}
            if json_file is not None:  # after every prompt, so that an interrupted run keeps what it has
                write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    show(summary)


def add_rivals(methods: dict[str, Generate], job: Job) -> dict[str, str]:
    """Add every rival that works here; returns why others do not."""
    skipped = {}
    for name, make in MAKERS.items():
        try:
            methods |= dict(make(job))
        except Exception as error:  # each library has errors of its own
            skipped[name] = f"{type(error).__name__}: {error}"
            print(f"skipped: {name} ({skipped[name]})")
    return skipped


def ours(model: Any, method: Method, prompt: list[int], max_new_tokens: int) -> list[int]:
    """One of transformers' methods, or of SpecBound's."""
    output = method.generate(model, torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)
    return list(output[0, len(prompt) :].tolist())


def llama_cpp(job: Job) -> Iterator[tuple[str, Generate]]:
    """llama.cpp as it was compiled with llama-cpp-python, plain and with that package's prompt lookup."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    options = {"n_ctx": job.context, "n_threads": job.threads, "n_threads_batch": job.threads, "flash_attn": True}
    for suffix, draft in (("", None), (LOOKUP, LlamaPromptLookupDecoding(NGRAM, LOOKUP_TOKENS))):
        options |= {"draft_model": draft, "logits_all": draft is not None}
        llama = Llama(rewritten(job, "BF16"), verbose=False, **options)

        def generate(prompt: list[int], most: int, llama: Any = llama) -> list[int]:
            llama.reset()  # nothing of an earlier prompt
            answer: list[int] = []
            for token in llama.generate(prompt, temp=0.0):  # the likeliest
                answer.append(token)
                if len(answer) == most or token in job.end:
                    break
            return answer

        yield f"llama-cpp-python bfloat16{suffix}", generate


def xllamacpp(job: Job) -> Iterator[tuple[str, Generate]]:
    """llama.cpp's server in xllamacpp's portable wheel, plain and with its own speculation by n-grams."""
    import xllamacpp as package

    for suffix in ("", LOOKUP):
        params = package.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = rewritten(job, "BF16"), job.context, 1
        params.cache_ram_mib, params.verbosity = 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        if suffix:
            params.speculative.types = [package.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            params.speculative.ngram_simple.size_n = NGRAM
            params.speculative.ngram_simple.size_m = LOOKUP_TOKENS
        server = package.Server(params)

        def generate(prompt: list[int], most: int, server: Any = server) -> list[int]:
            options = {"temperature": 0.0, "cache_prompt": False, "return_tokens": True, "verbose": True}
            found = server.handle_completions({"prompt": prompt, "max_tokens": most, **options})
            return list(found["__verbose"]["tokens"])

        yield f"xllamacpp bfloat16{suffix}", generate


def openvino(job: Job) -> Iterator[tuple[str, Generate]]:
    """OpenVINO GenAI on the GGUF file, in bfloat16 and with weights in eight bits, plain and with prompt lookup."""
    import openvino as runtime
    import openvino_genai as package

    for title, kind in (("bfloat16", "F16"), ("int8", "Q8_0")):
        for suffix in ("", LOOKUP):
            scheduler = package.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            options = {"INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": "bf16"}
            options |= {"scheduler_config": scheduler, **({"prompt_lookup": True} if suffix else {})}
            drafts = {"num_assistant_tokens": LOOKUP_TOKENS, "max_ngram_size": NGRAM} if suffix else {}
            pipeline = package.LLMPipeline(rewritten(job, kind), "CPU", **options)
            config = package.GenerationConfig(do_sample=False, stop_token_ids=job.end, **drafts)

            def generate(prompt: list[int], most: int, pipeline: Any = pipeline, config: Any = config) -> list[int]:
                config.max_new_tokens = most
                return list(pipeline.generate(runtime.Tensor(np.array([prompt])), config).tokens[0])

            yield f"openvino {title}{suffix}", generate


def rewritten(job: Job, name: str) -> str:
    """The file of the same model with every matrix dequantised, rounded to bfloat16, and written as this kind."""
    target, kind = job.folder / f"{name}.gguf", gguf.GGMLQuantizationType[name]
    if target.exists():
        return str(target)
    reader = gguf.GGUFReader(job.weights)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            writer.add_key_value(key, field.contents(), field.types[0], (*field.types, None)[1])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{name}"])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if is_matrix := values.ndim > 1:
            values = gguf.quants.quantize(torch.from_numpy(values).bfloat16().float().numpy(), kind)
        writer.add_tensor(tensor.name, values, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def record(methods: dict[str, Generate], number: int, runs: int, prompt: list[int], most: int) -> dict[str, Any]:
    """Run every method on one prompt, and again: seconds and ids. Each prompt begins with the next method."""
    names, found = list(methods), {name: {"seconds": [], "ids": []} for name in methods}
    turn = number % len(names)
    for name in (names[turn:] + names[:turn]) * runs:
        time.sleep(REST)
        started = time.perf_counter()
        answer = methods[name](prompt, most)
        found[name]["seconds"].append(time.perf_counter() - started)
        found[name]["ids"].append(answer)
    return {"prompt_tokens": len(prompt), "runs": found}


def summarize(records: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One method's speed, and on how many prompts all its runs gave stock's ids, the same, and its plain mode's."""
    runs = [record["runs"] for record in records]
    partner = "stock" if name in OURS else name.removesuffix(LOOKUP)
    made, stocks = (np.array([sum(map(len, run[key]["ids"])) for run in runs]) for key in (name, "stock"))
    taken, its = (np.array([sum(run[key]["seconds"]) for run in runs]) for key in (name, "stock"))
    ratios = (made / taken) / (stocks / its)
    low, high = interval(len(runs), lambda chosen: float(np.median(ratios[chosen])))
    return {
        "tokens_per_second": round(float(made.sum() / taken.sum()), 2),
        "times_stock": round(float(np.median(ratios)), 3),
        "times_stock_interval": [round(low, 3), round(high, 3)],
        "ids_as_stock": sum(run[name]["ids"] == run["stock"]["ids"] for run in runs),
        "ids_reproducible": sum(run[name]["ids"] == run[name]["ids"][:1] * len(run[name]["ids"]) for run in runs),
        "ids_as_its_plain_mode": sum(run[name]["ids"] == run[partner]["ids"] for run in runs),
    }


def show(summary: dict[str, Any]) -> None:
    """A table with a method a row; its last columns count prompts."""
    table = Table("method", "tokens/s", "times stock", "ids as stock", "as its other runs", "as plain", box=None)
    for name, one in summary.items():
        low, high = one["times_stock_interval"]
        same = [str(one[key]) for key in ("ids_as_stock", "ids_reproducible", "ids_as_its_plain_mode")]
        times = f"{one['times_stock']:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(name, f"{one['tokens_per_second']:.1f}", times, *same)
    Console(highlight=False, width=119).print(table)


MAKERS = {"llama-cpp-python": llama_cpp, "xllamacpp": xllamacpp, "openvino-genai": openvino}

if __name__ == "__main__":
    typer.run(main)
