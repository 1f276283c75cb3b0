"""Who is let in: names of this machine, keys, web pages of other origins; and what the server tells of itself."""

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.servers import MODEL_ID, PROMPT, running

BODY = {"model": MODEL_ID, "prompt": PROMPT, "max_tokens": 1}


@pytest.fixture(scope="module")
def loaded(make_model: Any, make_tokenizer: Any) -> tuple[Any, Any]:
    from runtime import SpeculationBounds
    from runtime.generate import attach
    from runtime.handle import SpecBound
    from tests.helpers.fake_heads import FakeHeads

    model = make_model()
    attach(model, SpecBound(model, FakeHeads("random", [2], vocabulary=128), SpeculationBounds(0.2, 2, 4)))
    model.specbound.prepare(model)
    return model, make_tokenizer()


@pytest.fixture(scope="module")
def open_url(loaded: Any) -> Iterator[str]:
    """Without a key."""
    with running(lambda: loaded, aliases=["other", "third"], cors_origins=["https://pages.example"]) as (url, _):
        yield url


@pytest.fixture(scope="module")
def keyed_url(loaded: Any) -> Iterator[str]:
    """With two keys."""
    with running(lambda: loaded, api_keys=["first", "second"], cors_origins=["*"]) as (url, _):
        yield url


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers, whose names are in lower case."""
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=60)
    try:
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        text = response.read()
        told = {key.lower(): value for key, value in response.getheaders()}
        return response.status, json.loads(text) if text.startswith(b"{") else text, told
    finally:
        connection.close()


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.2", "[::1]"])
@pytest.mark.parametrize("port", ["", ":8000"])
def test_names_of_this_machine_are_answered_to(open_url: str, name: str, port: str) -> None:
    assert ask(open_url, "GET", "/v1/models", Host=name + port)[0] == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""])
def test_names_of_others_are_not_answered_to(open_url: str, name: str) -> None:
    """A page elsewhere that has its own name lead to this machine gets nothing."""
    status, answer, _ = ask(open_url, "POST", "/v1/completions", BODY, Host=name)
    assert status == 403 and "local names" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer first", 200),
        ("bearer second", 200),
        ("BEARER first", 200),
        ("Bearer  first", 200),
        ("Basic first", 401),
        ("Bearer firs", 401),
        ("Bearer first second", 401),
        ("Bearer ", 401),
        ("first", 401),
    ],
)
def test_keys(keyed_url: str, given: str, status: int) -> None:
    for path, body in (("/v1/completions", BODY), ("/tokenize", {"prompt": "w1"})):
        assert ask(keyed_url, "POST", path, body, Authorization=given)[0] == status
    assert ask(keyed_url, "GET", "/health")[0] == 200


def test_several_names(open_url: str) -> None:
    """All are taken and listed; an answer tells the first."""
    assert [one["id"] for one in ask(open_url, "GET", "/v1/models")[1]["data"]] == [MODEL_ID, "other", "third"]
    for name in (MODEL_ID, "other", "third"):
        status, answer, _ = ask(open_url, "POST", "/v1/completions", BODY | {"model": name})
        assert (status, answer["model"]) == (200, MODEL_ID)
    status, answer, _ = ask(open_url, "POST", "/v1/completions", BODY | {"model": "fourth"})
    assert status == 404 and "'tiny', 'other', 'third' only" in answer["error"]["message"]


def test_a_wrong_method_is_told_the_right_one(open_url: str) -> None:
    status, answer, headers = ask(open_url, "GET", "/v1/completions")
    assert status == 405 and headers["allow"] == "POST" and answer["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", f"/v1/models/{MODEL_ID}", "/openapi.json"])
def test_head_is_get_without_the_body(open_url: str, path: str) -> None:
    """As probes of load balancers ask; a route without GET has no HEAD."""
    status, answer, headers = ask(open_url, "HEAD", path)
    assert status == 200 and answer == b""
    assert headers["content-type"] == ask(open_url, "GET", path)[2]["content-type"]
    assert ask(open_url, "HEAD", "/v1/completions")[0] == 405 and ask(open_url, "HEAD", "/nothing")[0] == 404


def test_encoded_bodies_are_refused(open_url: str) -> None:
    """Those that say they are, whether or not they are; `identity` says nothing."""
    for encoding in ("gzip", "br", "deflate, gzip"):
        status, answer, _ = ask(open_url, "POST", "/v1/completions", BODY, **{"Content-Encoding": encoding})
        assert status == 415 and "Content-Encoding is not supported" in answer["error"]["message"]
    assert ask(open_url, "POST", "/v1/completions", BODY, **{"Content-Encoding": "Identity"})[0] == 200


def test_openapi(open_url: str) -> None:
    """It describes the routes; the pages that would load scripts from elsewhere are not there."""
    status, found, _ = ask(open_url, "GET", "/openapi.json")
    assert status == 200 and {"/v1/chat/completions", "/v1/completions", "/tokenize"} <= found["paths"].keys()
    assert "min_p" in found["components"]["schemas"]["ChatRequest"]["properties"]
    assert ask(open_url, "GET", "/docs")[0] == 404


def test_openapi_tells_forms_and_errors(open_url: str) -> None:
    """Fields of several forms, null in any, what changes nothing, and errors as they come."""
    found = ask(open_url, "GET", "/openapi.json")[1]
    schemas = found["components"]["schemas"]
    body = schemas["CompletionRequest"]
    kinds = [one.get("type") for one in body["properties"]["prompt"]["anyOf"]]
    assert kinds == ["string", "array", "array"] and {"type": "null"} in body["properties"]["stop"]["anyOf"]
    assert body["additionalProperties"] == {"type": "null"} and body["properties"]["use_beam_search"] == {
        "enum": [False, None]
    }
    assert {"type": "string"} in schemas["Message"]["properties"]["content"]["anyOf"]
    assert schemas["Called"]["properties"]["arguments"]["type"] == ["string", "object"]
    for path, methods in found["paths"].items():
        for about in methods.values():
            answers = about["responses"]
            error = answers["default"]["content"]["application/json"]["schema"]["properties"]["error"]
            assert error["required"] == ["message", "type", "param", "code"]
            assert "422" not in answers and answers.keys() <= {"200", "503", "default"}, path
    answers = found["paths"]["/v1/completions"]["post"]["responses"]["200"]
    assert answers["content"].keys() == {"application/json", "text/event-stream"}


def test_openapi_tells_ranges(open_url: str) -> None:
    """What a body is refused for is told, as far as a schema can say it."""
    schemas = ask(open_url, "GET", "/openapi.json")[1]["components"]["schemas"]
    chat, response, tokenize = (schemas[f"{name}Request"]["properties"] for name in ("Chat", "Responses", "Tokenize"))
    assert chat["messages"]["minItems"] == 1 == tokenize["messages"]["anyOf"][0]["minItems"]
    for field in ("stop", "temperature", "top_p", "top_k", "min_p", "seed"):
        assert chat[field] == response[field], field
    bias = chat["logit_bias"]["anyOf"][0]
    assert re.search(bias["propertyNames"]["pattern"], "12") and not re.search(bias["propertyNames"]["pattern"], "w1")
    assert bias["additionalProperties"]["maximum"] == 100
    assert [each["required"] for each in schemas["TokenizeRequest"]["oneOf"]] == [["prompt"], ["messages"]]


def test_pages_of_other_origins(open_url: str, keyed_url: str) -> None:
    """A preflight needs no key; refusals can be read too; origins that were not named are not let in."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ours, theirs = {"Origin": "https://pages.example"}, {"Origin": "https://evil.example"}
    allowed = "access-control-allow-origin"
    status, _, headers = ask(keyed_url, "OPTIONS", "/v1/completions", **theirs, **asked)
    assert status == 200 and headers[allowed] == "*"
    status, _, headers = ask(keyed_url, "POST", "/v1/completions", BODY, **theirs)
    assert status == 401 and headers[allowed] == "*"
    status, _, headers = ask(open_url, "POST", "/v1/completions", BODY, **ours)
    assert status == 200 and headers[allowed] == "https://pages.example"
    assert allowed not in ask(open_url, "POST", "/v1/completions", BODY, **theirs)[2]
    assert ask(open_url, "OPTIONS", "/v1/completions", **theirs, **asked)[0] == 400
