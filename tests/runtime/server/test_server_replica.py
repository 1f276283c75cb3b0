"""`Replica`, without Ray: it is there once its model is, answers as the server does, and ends."""

from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from runtime import save_adapter
from runtime.errors import AdapterError
from runtime.server.replica import Replica
from tests.helpers.servers import following

ASKED = {"model": "tiny", "prompt": "w5 w9", "max_tokens": 8, "seed": 3, "temperature": 0.9}
GIVEN: dict[str, Any] = {"name": "tiny", "dtype": "float32", "threads": 1, "kv_memory": 0.01}
HOME = "http://localhost"


@pytest.fixture
def adapter(tmp_path: Any, tiny_base: Any, make_model: Any, make_adapter: Any) -> str:
    """Folder of an adapter of the tiny base."""
    save_adapter(make_adapter(make_model(), base_model_name_or_path=str(tiny_base)), tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_two_replicas_answer_alike(adapter: str) -> None:
    """Ids of equal seeded requests are equal, and those of plain `generate`; limits are kept; the threads end."""
    replicas = [Replica(adapter, **GIVEN, max_tokens=10) for _ in range(2)]
    texts = []
    for replica in replicas:
        client = TestClient(replica.__serve_build_asgi_app__(), base_url=HOME)
        assert client.get("/health").status_code == 200
        texts.append(client.post("/v1/completions", json=ASKED).json()["choices"][0]["text"])
        assert client.post("/v1/completions", json=ASKED | {"max_tokens": 11}).status_code == 400
    model, tokenizer = replicas[0].worker.model, replicas[0].worker.tokenizer
    ids = tokenizer(ASKED["prompt"], return_tensors="pt").input_ids
    torch.manual_seed(ASKED["seed"])
    with model.specbound.disabled():
        written = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=0.9)[0, ids.shape[1] :]
    assert texts == [following(tokenizer, ids[0].tolist(), written.tolist())] * 2
    for replica in replicas:
        replica.__del__()
        assert replica.worker.stop(60) and replica.worker.state == "draining"


def test_keys_come_from_the_environment(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments stand on Ray's dashboard."""
    monkeypatch.setenv("SPECBOUND_API_KEY", "one two")
    replica = Replica(adapter, **GIVEN)
    client = TestClient(replica.__serve_build_asgi_app__(), base_url="http://any.example")
    statuses = [
        client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code for key in ("one", "two", "x")
    ]
    assert statuses == [200, 200, 401]


def test_one_that_cannot_load_says_why(tmp_path: Any) -> None:
    """So that Ray never sends a request there."""
    with pytest.raises(AdapterError, match="nowhere"):
        Replica(str(tmp_path / "nowhere"), **GIVEN)
