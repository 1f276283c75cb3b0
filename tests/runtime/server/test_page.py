"""The page in a real browser: it chats, marks what was drafted, and compares with plain decoding."""

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


# The least contrast of any visible text with what is behind it, and the text that has it.
CONTRAST = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const channel = (value) => value <= 10.31 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    const color = rgb(getComputedStyle(node).backgroundColor);
    return color.length === 3 ? color : behind(node.parentElement);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = [99, ""];
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !node.getClientRects().length || node.disabled) continue;
    const [low, high] = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least[0]) least = [contrast, node.textContent];
  }
  return least;
}"""


@pytest.fixture
def served(make_model: Any, make_tokenizer: Any) -> Iterator[tuple[str, Any, str]]:
    """The address of a tiny model whose drafts are sometimes right, the model, and its answer to the question."""
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer(QUESTION)["input_ids"]
    truth = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0].tolist()
    text = tokenizer.decode(truth[3:], skip_special_tokens=True)
    attach(model, SpecBound(model, FakeHeads("mixed", [2, 4], truth, vocabulary=128), SpeculationBounds(0.6, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, tokenizer)) as (url, _):
        yield url, model, text


def test_the_page(page: Any, served: tuple[str, Any, str]) -> None:
    url, model, text = served
    problems: list[str] = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    # wait_for_function would evaluate text, which the page forbids
    page.wait_for_selector("#model:text-is('tiny')")
    assert "bit for bit equal" in page.text_content("#status")
    assert page.is_visible("#welcome") and page.query_selector_all("#examples button")
    assert not page.is_visible("#legend") and not page.is_visible("#reset")
    page.fill("#tokens", "40")
    page.fill("#input", QUESTION)
    page.press("#input", "Enter")
    assert page.query_selector("#welcome") is None
    page.wait_for_selector("text=the same text", timeout=120_000)
    ours, plain = page.query_selector_all(".answer .text")
    shown = ours.evaluate("node => [...node.querySelectorAll('span')].map(each => each.textContent).join('')")
    assert shown == plain.text_content() == text
    stats = model.specbound.stats
    marked = ours.query_selector_all("span[data-exit]")
    assert len(marked) == stats.accepted.total() > 5
    assert {span.get_attribute("data-exit") for span in marked} == {"2", "4"}
    lines = {span.evaluate("node => getComputedStyle(node).textDecorationStyle") for span in marked}
    assert len(lines) == 2  # sources are told apart without colours
    assert "accepted" in marked[0].get_attribute("title")
    assert not plain.query_selector_all("[data-exit]")
    legend = page.text_content("#keys")
    assert all(f"layer {exit} {stats.accepted[exit]}/{stats.drafted[exit]}" in legend for exit in (2, 4))
    rejected = ours.query_selector_all("del")
    assert rejected and not rejected[0].is_visible()
    page.check("#rejected")
    assert rejected[0].is_visible()
    spoken = page.text_content("#spoken")
    assert text.strip() in spoken and spoken.endswith("the same text")
    notes = [note.text_content() for note in page.query_selector_all(".answer .note")]
    assert "times as fast as plain decoding" in notes[0] and "the same text" in notes[1]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        contrast, where = page.evaluate(CONTRAST)
        assert contrast >= 4.5, (scheme, where)
    page.click("#reset")
    assert page.is_visible("#welcome") and not page.query_selector_all(".answer, .user")
    assert all(each.startswith((url, "data:")) for each in requests) and problems == []


def test_the_page_tells_of_a_refused_request(page: Any, served: tuple[str, Any, str]) -> None:
    """In the place of an answer; what was written stays."""
    problems: list[str] = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(served[0])
    page.wait_for_selector("#model:text-is('tiny')")
    page.fill("#tokens", "9999")
    page.fill("#input", "w1")
    page.press("#input", "Enter")
    page.wait_for_selector(".error")
    assert "context is 512" in page.text_content(".error")
    assert page.input_value("#input") == "w1" and not page.query_selector_all(".answer")
    assert [text for text in problems if "400" not in text] == []  # a browser tells of each refused request


def test_the_page_by_keyboard(page: Any, served: tuple[str, Any, str]) -> None:
    """One tab stop for the marks of an answer; the arrows go on, and what has the focus is explained."""
    page.goto(served[0])
    page.wait_for_selector("#send:not([disabled])")
    page.fill("#tokens", "40")
    page.fill("#input", QUESTION)
    page.press("#input", "Enter")
    page.wait_for_selector("text=the same text", timeout=120_000)
    page.focus("#reset")
    page.keyboard.press("Tab")
    first = page.text_content("#detail")
    assert "was drafted by layer" in first
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.title") == page.text_content("#detail")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "input"


def test_the_page_stops(page: Any, served: tuple[str, Any, str]) -> None:
    """The one button stops an answer; on a phone the options are folded and nothing is wider than the screen."""
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto(served[0])
    page.wait_for_selector("#send:not([disabled])")
    assert not page.is_visible("#tokens")
    page.click("summary")
    page.fill("#tokens", "400")
    page.fill("#input", QUESTION)
    page.click("#send")
    page.wait_for_selector(".answer .text span")
    assert page.text_content("#send") == "Stop"
    page.click("#send")
    page.wait_for_selector("text=stopped")
    assert page.text_content("#send") == "Send" and len(page.query_selector_all(".answer")) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
