"""The server from its start to its end: loading, the key, signals, what it refuses to start with."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from runtime import SpeculationBounds, save_adapter
from runtime.cli.app import run
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.servers import MODEL_ID, PROMPT, running, until
from train.cli.app import app


def test_health_while_loading_and_the_key(make_model: Any, make_tokenizer: Any) -> None:
    loaded, model = threading.Event(), make_model()
    attach(model, SpecBound(model, FakeHeads("random", [2], vocabulary=128), SpeculationBounds(0.2, 2, 4)))

    def load() -> tuple[Any, Any]:
        loaded.wait(60)
        model.specbound.prepare(model)
        return model, make_tokenizer()

    def health() -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=60)
        connection.request("GET", "/health")
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    with running(load, wait=False, api_keys=["s3cret"]) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0)
        assert health() == (503, {"status": "loading"})
        with pytest.raises(openai.InternalServerError, match="the model is loading") as caught:
            client.completions.create(model=MODEL_ID, prompt="w1")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        loaded.set()
        until(lambda: health()[0] == 200)
        assert "bit for bit equal" in health()[1]["certificate"]
        assert client.completions.create(model=MODEL_ID, prompt="w1").choices[0].text
        for wrong in ("other", "s3cre"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client.with_options(api_key=wrong).models.list()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/metrics")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: Any, make_model: Any, make_adapter: Any, tiny_base: Path) -> Path:
    folder: Path = tmp_path_factory.mktemp("served") / "adapter"
    save_adapter(make_adapter(make_model(), base_model_name_or_path=str(tiny_base)), folder)
    return folder


def test_sigterm(adapter: Path, tmp_path: Path) -> None:
    """The process itself: the stream that runs is finished, what waits is refused, nothing new comes in, exit 0.

    The adapter is damaged while it serves: it goes on, having read all that it needs.
    """
    adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    command = [
        sys.executable,
        "-m",
        "train.cli.app",
        "serve",
        "--adapter",
        str(adapter),
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        assert said.startswith("serving base on http://127.0.0.1:")
        url = said.split()[3].rstrip(",")
        assert process.stderr.readline().startswith("ready: bit for bit equal")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=3)
        for path in adapter.iterdir():
            path.write_bytes(b"broken")
        arguments: Any = {"model": "base", "prompt": PROMPT, "max_tokens": 150, "stream": True}
        stream = client.completions.create(**arguments)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and rest[-1].id == first.id
        assert process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.with_options(max_retries=0).models.list()
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_an_impatient_interrupt() -> None:
    """Ctrl-C again, while what runs is waited for: the same end, and not one in the middle of torch."""
    program = """
import signal, threading, time
from runtime.server import serve
from runtime.server.listener import bind

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
serve.STOP_SECONDS = 3.0
main, stop = threading.main_thread(), serve.Worker.stop

def stopped(worker, timeout):
    threading.Timer(0.5, signal.pthread_kill, (main.ident, signal.SIGINT)).start()
    return stop(worker, timeout)

serve.Worker.stop = stopped
with bind("127.0.0.1", 0, has_key=False) as listener:
    threading.Timer(1.0, signal.pthread_kill, (main.ident, signal.SIGINT)).start()
    serve.serve(lambda: time.sleep(60), listener, names=["m"])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stderr) == (130, "")


def test_the_port_is_bound_before_slow_libraries(tmp_path: Path) -> None:
    """Who comes early waits, and is not refused; a port that is taken is told at once."""
    watch = """
import socket, sys
from train.cli.app import app

def watched(address, **options):
    slow = {"torch", "transformers", "fastapi", "uvicorn"} & sys.modules.keys()
    print("slow:", sorted(slow), file=sys.stderr)
    raise OSError(98, "is watched")

socket.create_server = watched
app(["serve", "--adapter", sys.argv[1]])
"""
    command = [sys.executable, "-c", watch, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 1
    assert found.stderr.splitlines() == ["slow: []", "error: 127.0.0.1 port 8000 cannot be bound: is watched"]


def test_several_names_and_keys(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the options and the environment give them."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("runtime.server.serve.serve", lambda load, listener, **options: given.update(options))
    arguments = ["serve", "--adapter", str(adapter), "--port", "0", "--cors-origin", "https://pages.example"]
    environment = {"SPECBOUND_API_KEY": "first second"}
    names = ["--served-model-name", "a", "--served-model-name", "b"]
    result = CliRunner().invoke(app, [*arguments, *names], env=environment)
    assert result.exit_code == 0 and result.stderr.startswith("serving a, b on http://127.0.0.1:")
    assert (given["names"], given["api_keys"]) == (["a", "b"], ["first", "second"])
    assert given["cors_origins"] == ["https://pages.example"] and given["limits"].max_tokens is None
    CliRunner().invoke(app, [*arguments, "--api-key", "k", "--api-key", ""])
    assert (given["names"], given["api_keys"]) == (["base"], ["k"])


def test_serve_says_what_is_wrong(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["serve", "--adapter", str(adapter), *arguments])
        assert result.exit_code == 1 and result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
        return result.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in fails("--port", str(taken.getsockname()[1]))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert "set an API key" in fails("--host", host)
    assert "cannot be bound" in fails("--host", "192.0.2.1", "--api-key", "k")
    assert "could not be loaded" in fails("--port", "0", "--model", str(tmp_path))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for module in [name for name in sys.modules if name.startswith("runtime.server")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "argv", ["specbound", "serve", "--adapter", str(adapter)])
    with pytest.raises(SystemExit, match="1"):
        run(app)
    assert "uvicorn is not installed: pip install 'specbound[serve]'" in capsys.readouterr().err
