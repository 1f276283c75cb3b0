"""Messages that hold no text: what they are is said in plain words, and each kind is counted."""

import json

from train.corpus.collection import Collection


def test_what_is_no_text_is_named(tmp_path):
    """Calls of tools, pictures and other parts, as OpenAI, Anthropic and ShareGPT write them."""
    user, call = {"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    rows = [{"messages": [user, call]}, {"messages": [user, call | {"content": ""}]}]
    rows += [{"messages": [user, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}]
    rows += [{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]}]
    rows += [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, picture]}]}]
    rows += [{"messages": [{"role": "user", "content": [{"image": "x.png"}, {"text": "a"}]}]}]
    rows += [{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]}]
    rows += [{"messages": [{"role": "user", "content": None}]}]
    rows += [{"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}]
    rows += [{"messages": [user, call | {"content": "b"}]}]  # it has a text
    parts = [{"type": "text", "text": "an image", "image_url": None}, "b"]
    rows += [{"messages": [{"role": "user", "content": parts}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Collection.read(str(tmp_path / "a.jsonl"))
    texts = [(*one.prompt.texts, *one.answers) for one in found.conversations]
    assert texts == [("a", "b"), ("an imageb",)]
    only = "in a message, of which only text can be read"
    assert found.skipped == {
        "a call of a tool in the place of a text": 3, f"a call of a tool {only}": 1, f"a picture {only}": 2,
        f"a recording {only}": 1, "a message without a text": 1, "a part of a message without a text": 1,
    }  # fmt: skip
