"""An external generator over the loopback: the corpus that the base makes, retries, answers of another model."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
import torch

from runtime.errors import ConfigError, DataError
from runtime.text.prompts import Message, Prompt
from train.corpus.corpus import distil
from train.corpus.options import CorpusOptions
from train.corpus.prompts import SPLITS
from train.publishing.assembly import portable

OPTIONS = CorpusOptions(max_new_tokens=6, batch_size=4, chat_template="none")
PROMPTS = [Prompt((Message("user", f"w{n} w{n + 1}"),), ("w9 w8",) * (n % 2)) for n in range(12)]


@contextmanager
def serving(model, tokenizer, *, statuses=()):
    """An engine on 127.0.0.1 that greedily answers with `model`; `statuses` are its first answers. Gives its URL."""
    pending, seen = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply({"data": [{"id": "tiny"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if pending:
                return self.reply({}, pending.pop(0))
            seen.append(body)
            choices = []
            for index, ids in enumerate(body["prompt"]):
                found = model.generate(torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False)
                text = tokenizer.decode(found[0, len(ids) :])
                choices.insert(0, {"index": index, "text": text, "finish_reason": "length"})
            self.reply({"choices": choices})

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def rows(folder):
    found = [row for split in SPLITS for row in pq.read_table(folder / f"{split}.parquet").to_pylist()]
    return sorted((row["prompt_ids"], row["response_ids"]) for row in found)


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


def run(model, tokenizer, folder, **others):
    options = {"fingerprint": "base", "progress": False}
    return distil(model, tokenizer, PROMPTS, folder, OPTIONS, **options | others)


@pytest.mark.parametrize("together", [False, True])
def test_the_corpus_is_the_one_that_the_base_makes(make_model, tokenizer, tmp_path, fresh_accelerate, together):
    model = make_model()
    with serving(make_model(), tokenizer, statuses=[503, 429]) as (url, seen):
        remote = run(model, tokenizer, tmp_path / "remote", generator=url, together=together)
    assert {body["temperature"] for body in seen} == {0.0} and {body["model"] for body in seen} == {"tiny"}
    assert rows(remote) == rows(run(model, tokenizer, tmp_path / "own"))
    assert "127.0.0.1" not in (remote / "corpus.json").read_text()
    with pytest.raises(ConfigError, match="external"):
        run(model, tokenizer, remote)


def test_answers_of_another_model_are_refused(make_model, tokenizer, tmp_path):
    with (
        serving(make_model(seed=1), tokenizer) as (url, _),
        pytest.raises(DataError, match=r"model 'tiny'\): \d+ % of 24 tokens are what the base would say, expected 90"),
    ):
        run(make_model(), tokenizer, tmp_path, generator=url)


def test_a_refusal_and_a_silent_engine_are_one_line(make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr("train.corpus.remote.time.sleep", lambda seconds: None)
    model = make_model()
    with serving(model, tokenizer, statuses=[401]) as (url, _), pytest.raises(ConfigError, match="401") as caught:
        run(model, tokenizer, tmp_path, generator=url)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"no answer to models .*refused.*leave --generator out"):
        run(model, tokenizer, tmp_path, generator=url)
    with pytest.raises(ConfigError, match="expected a URL, such as http"):
        run(model, tokenizer, tmp_path, generator="file:///etc/passwd")


def test_an_address_stays_out_of_what_is_published():
    assert portable("http://10.0.0.7:8000/v1") == "URL"
