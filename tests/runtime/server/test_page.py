"""The page in a real browser: it chats, tints what was drafted, and sets the speed of plain decoding beside."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.servers import running

sync_api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
QUESTION = "w5 w17 w33"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of a headless Chromium."""
    program = next((found for found in map(shutil.which, NAMES) if found), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1000, "height": 900})
        browser.close()


def test_the_page(page: Any, make_model: Any, make_tokenizer: Any) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer(QUESTION)["input_ids"]
    truth = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
    text = tokenizer.decode(truth[3:], skip_special_tokens=True)
    attach(model, SpecBound(model, FakeHeads("mixed", [2, 4], truth, vocabulary=128), SpeculationBounds(0.6, 4, 4)))
    model.specbound.prepare(model)
    problems: list[str] = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    with running(lambda: (model, tokenizer)) as (url, _):
        page.goto(url)
        page.wait_for_selector(
            "#model:text-is('tiny')"
        )  # wait_for_function would evaluate text, which the page forbids
        assert "bit for bit equal" in page.text_content("#status")
        page.fill("#tokens", "40")
        page.fill("#input", QUESTION)
        page.press("#input", "Enter")
        page.wait_for_selector("text=the same text", timeout=120_000)
        ours, plain = page.query_selector_all(".answer .text")
        shown = ours.evaluate("node => [...node.querySelectorAll('span')].map(each => each.textContent).join('')")
        assert shown == plain.text_content() == text
        tinted = ours.query_selector_all("span[data-exit]")
        assert len(tinted) == model.specbound.stats.accepted.total() > 5
        assert {span.get_attribute("data-exit") for span in tinted} == {"2", "4"}
        assert "accepted" in tinted[0].get_attribute("title")
        assert not plain.query_selector_all("span[data-exit]")
        legend = page.text_content("#keys")
        stats = model.specbound.stats
        assert all(f"layer {exit} {stats.accepted[exit]}/{stats.drafted[exit]}" in legend for exit in (2, 4))
        struck = ours.query_selector_all("del")
        assert struck and not struck[0].is_visible()
        page.check("#rejected")
        assert struck[0].is_visible()
        notes = [note.text_content() for note in page.query_selector_all(".answer .note")]
        assert "times plain decoding" in notes[0] and "the same text" in notes[1]
        if folder := os.environ.get("SPECBOUND_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/page-tiny.png", full_page=True)
        page.click("#reset")
        page.fill("#tokens", "9999")
        page.fill("#input", "w1")
        page.press("#input", "Enter")
        page.wait_for_selector(".error")
        assert "context is 512" in page.text_content(".error")
    assert all(each.startswith((url, "data:")) for each in requests)
    assert [text for text in problems if "400" not in text] == []  # a browser tells of each refused request
