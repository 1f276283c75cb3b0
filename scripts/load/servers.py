"""A server under a public load generator: guidellm's figures at several requests at once, and whether answers repeat.

Starts one server of OpenAI's API, asks it some prompts alone, lets guidellm send all prompts at each number of
requests at once, and asks the first ones again, all together. Each call adds a run to the report: call it for each
server in turn, and again. guidellm (0.8) has a virtual environment of its own. Example:
python scripts/load/servers.py SpecBound "specbound serve --adapter adapters/smollm2-135m-instruct --port {port}" \\
    --guidellm ~/guidellm/bin/guidellm --tokenizer ~/SmolLM2-135M-Instruct --json serving.json
"""

import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from runtime.conditions import conditions
from runtime.files import write_atomic
from runtime.text.prompts import read_prompts, spread

NEW_TOKENS = 64
START = 300.0  # seconds until the server must answer
FIGURES = {
    "tokens_per_second": ("output_tokens_per_second", "mean"),
    "first_token_ms_p50": ("time_to_first_token_ms", "p50"),
    "first_token_ms_p99": ("time_to_first_token_ms", "p99"),
    "between_tokens_ms_p50": ("inter_token_latency_ms", "p50"),
}


def main(
    name: Annotated[str, typer.Argument(help="Of the server, in the report.")],
    command: Annotated[str, typer.Argument(help="Starts the server; {port} stands for the port.")],
    tokenizer: Annotated[str, typer.Option(help="Folder of the base's tokenizer, for guidellm.")],
    prompts: Annotated[str, typer.Option(help="A file of prompts.")] = "configs/data/demo_prompts.jsonl",
    guidellm: Annotated[str, typer.Option(help="Its command.")] = "guidellm",
    version: Annotated[str, typer.Option(help="Of the server, for the report.")] = "",
    model: Annotated[str | None, typer.Option(help="The model's id. By default the server's first.")] = None,
    body: Annotated[str, typer.Option(help="JSON: more fields for each request.")] = "{}",
    limit: Annotated[int, typer.Option(min=1, help="Prompts, at even distances.")] = 32,
    alone: Annotated[int, typer.Option(min=0, help="Prompts that are asked alone and all together.")] = 12,
    at_once: Annotated[list[int], typer.Option(help="Requests at once; may be given several times.")] = [1, 4, 8, 16],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json", help="The run is added to this report.")] = None,
) -> None:
    """Measure one server once, print, add the run to the report."""
    texts = [prompt.messages[-1].content for prompt in spread(read_prompts(prompts), limit)]
    fields = {"temperature": 0, "max_tokens": NEW_TOKENS} | json.loads(body)
    run: dict[str, Any] = {
        "version": version,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "load_before": round(os.getloadavg()[0], 2),
    }
    before, started = others(), time.monotonic()
    with serving(command) as url:
        fields["model"] = model or get(f"{url}/v1/models")["data"][0]["id"]
        first = [answer(url, fields, text) for text in texts[:alone]]
        run["at_once"] = load(url, fields, texts, at_once, guidellm, tokenizer)
        with ThreadPoolExecutor(max(alone, 1)) as pool:
            second = list(pool.map(lambda text: answer(url, fields, text), texts[:alone]))
        if alone:
            run["same_answers"] = [sum(one == other for one, other in zip(first, second, strict=True)), len(first)]
    run["cores_of_others"] = round((others() - before) / (time.monotonic() - started), 2)
    server = {"command": command, "body": json.loads(body), "runs": [run]}
    report = add(json_file, name, server, len(texts))
    show(report)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(report, indent=1) + "\n").encode())


def others() -> float:
    """Seconds of CPU that this machine has given to processes other than this one and its ended children.

    A server's own processes are among the others where it does not wait for their end.
    """
    user, nice, system = map(int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:4])
    times = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(times[:4])


@contextmanager
def serving(command: str) -> Iterator[str]:
    """A server's address, from when it answers until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(shlex.split(command.format(port=port)), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START
        while not answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"The server did not start: {command}")
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Whether the server is there and has its model."""
    try:
        get(f"{url}/health")
    except (OSError, ValueError):
        return False
    return True


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers, from JSON; nothing, if that is empty."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read() or "null")


def answer(url: str, fields: dict[str, Any], text: str) -> str:
    """The whole answer to a prompt."""
    messages = [{"role": "user", "content": text}]
    given = get(f"{url}/v1/chat/completions", fields | {"messages": messages})
    return str(given["choices"][0]["message"]["content"])


def load(
    url: str, fields: dict[str, Any], texts: list[str], at_once: list[int], guidellm: str, tokenizer: str
) -> dict[str, Any]:
    """guidellm's figures by requests at once."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder, "prompts.jsonl"), Path(folder, "report.json")
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
        options = {
            "backend": {
                "kind": "openai_http",
                "target": url,
                "model": fields["model"],
                "http2": False,
                "extras": {"body": fields},
            },
            "tokenizer": {"kind": "huggingface_auto", "model": tokenizer},
            "data": {"kind": "json_file", "path": str(data)},
            "profile": {"kind": "concurrent", "streams": at_once},
            "constraint": {"kind": "max_requests", "count": len(texts)},
            "output": {"kind": "json", "path": str(output)},
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", json.dumps(value))]
        if len(at_once) > 1:
            arguments += ["--override", "profile.streams", ",".join(map(str, at_once))]
        subprocess.run([*shlex.split(guidellm), "run", *arguments, "--disable-console"], check=True)
        benchmarks = json.loads(output.read_bytes())["benchmarks"]
    return {str(each): figures(one, len(texts)) for each, one in zip(at_once, benchmarks, strict=True)}


def figures(benchmark: dict[str, Any], requests: int) -> dict[str, Any]:
    """Of one number of requests at once; every request must have been answered."""
    metrics = benchmark["metrics"]
    answered = metrics["request_totals"]["successful"]
    if answered != requests:
        raise SystemExit(f"{answered} of {requests} requests were answered.")
    result: dict[str, Any] = {"tokens": int(metrics["output_token_count"]["successful"]["total_sum"])}
    for name, (metric, part) in FIGURES.items():
        summary = metrics[metric]["successful"]
        result[name] = round(summary[part] if part in summary else summary["percentiles"][part], 1)
    return result


def add(json_file: Path | None, name: str, server: dict[str, Any], prompts: int) -> dict[str, Any]:
    """The report that there is, with one run more."""
    if json_file is not None and json_file.exists():
        report: dict[str, Any] = json.loads(json_file.read_bytes())
    else:
        report = conditions(torch.device("cpu"), torch.bfloat16)
        report |= {"prompts": prompts, "new_tokens": NEW_TOKENS, "servers": {}}
    runs = report["servers"].get(name, {}).get("runs", [])
    report["servers"][name] = server | {"runs": runs + server["runs"]}
    return report


def show(report: dict[str, Any]) -> None:
    """A table: means over the runs of each server."""
    table = Table("server", "at once", *FIGURES, "same answers")
    for name, server in report["servers"].items():
        runs = server["runs"]
        same = ", ".join("{} of {}".format(*run["same_answers"]) for run in runs if "same_answers" in run)
        for each in sorted({each for run in runs for each in run["at_once"]}, key=int):
            seen = [run["at_once"][each] for run in runs if each in run["at_once"]]
            means = [f"{statistics.mean(one[figure] for one in seen):.1f}" for figure in FIGURES]
            table.add_row(name, each, *means, same)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
