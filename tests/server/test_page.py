"""The page in a real browser: Chromium, by playwright."""

import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from oracle import make_oracle
from words import byte_level, save_words

from foveal import LLM
from foveal.server import web

from .serving import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
KEY = "open sesame"
QUESTION = "Where is the naïve cat?"


def test_only_files_of_the_package_are_served() -> None:
    """Guards against assets from elsewhere: without them the page works where there is no network."""
    app = FastAPI()
    app.include_router(web.router)
    client = TestClient(app)
    for path in web.PATHS:
        response = client.get(path)
        assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
        # The name of a markup language is no address.
        remote = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]+[^\s\"']*", response.text))
        assert remote <= {"http://www.w3.org/2000/svg"}
    assert client.get("/page/../look.py").status_code == client.get("/page/other.js").status_code == 404


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    tokens = save_words(byte_level("gpt-2"), path, TEMPLATE)
    make_oracle("deepseek_v32", path, vocab_size=tokens, max_position_embeddings=1024, eos_token_id=None)
    return path


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: the page cannot be shown")
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: the page cannot be shown")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser: "Browser", **options: Any) -> "Page":
    """A page whose waits end with what they wait for, however busy the machine is."""
    page = browser.new_page(**options)
    page.set_default_timeout(300_000)
    return page


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(LLM(folder, dtype="float32"), api_keys=(KEY,)) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    return server.url


@contextmanager
def paused(server: Server, after: int) -> Iterator[None]:
    """After so many steps the engine waits for the block to end."""
    step, count, go_on = server.llm.engine.step, itertools.count(), threading.Event()

    def waiting() -> Any:
        if next(count) >= after:
            assert go_on.wait(300)
        return step()

    server.llm.engine.step = waiting  # type: ignore[method-assign]
    try:
        yield
    finally:
        server.llm.engine.step = step  # type: ignore[method-assign]
        go_on.set()


@pytest.fixture(params=["wide light", "wide dark", "narrow light", "narrow dark"])
def page(request: pytest.FixtureRequest, browser: "Browser", address: str) -> "Iterator[Page]":
    size, scheme = request.param.split()
    wide = size == "wide"
    shape = {"width": 1280 if wide else 390, "height": 800 if wide else 844}
    page = open_page(browser, viewport=shape, color_scheme=scheme, has_touch=not wide)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else wrong.append(sent.url))
    page.goto(address)
    yield page
    page.close()
    assert not wrong


def ask(page: "Page", question: str = QUESTION, *, length: int = 60) -> None:
    page.wait_for_selector(".wrong.start:has-text('API key')")
    page.fill("#key", KEY)
    page.fill("#max-tokens", str(length))
    page.wait_for_selector("#model:has-text('tiny')")
    page.click("#settings-button")
    page.fill("#prompt", question)
    page.keyboard.press("Enter")


@pytest.mark.slow
def test_chat_and_look(page: "Page", server: Server) -> None:
    """Guards against a page that breaks in either colour scheme or on a phone: the key, a stream, the look."""
    with paused(server, after=20):
        ask(page)
        page.wait_for_selector(".message.assistant .t >> nth=5", state="attached")
        assert page.locator(".foot").count() == 0, "the answer came at once"
    page.wait_for_selector(".foot:has-text('60 tokens')")
    assert page.locator(".message.user .text").inner_text() == QUESTION
    assert page.locator(".wrong").count() == 0

    page.locator(".message.assistant .t").nth(40).click()
    prompt = page.locator("#context .prompt-end ~ .t").count()
    whole = page.locator("#context .t").count()
    assert prompt == 60 and page.locator("#look").is_visible()
    prompt = whole - prompt
    here = place(page)  # special tokens are not in the answer's text
    assert prompt + 40 <= here < prompt + 45
    assert "".join(page.locator("#context .t").all_text_contents()[:prompt]).replace("↵", "") == (
        f"user: {QUESTION}\nassistant:"
    )
    shares = shades(page)
    assert max(shares[:here]) > 0 and not any(shares[here:])
    assert sum(shares) == pytest.approx(12, abs=0.1), "a layer attends to 12 tokens"
    assert f"12 of {here} tokens" in page.locator("#figures").inner_text()
    assert re.search(r"Recall\s+[\d.]+ %", page.locator("#figures").inner_text())

    keep_picture(page)
    for layer in range(3):
        page.locator("#layers button").nth(layer + 1).click()
        assert sorted(shades(page), reverse=True) == [1.0] * 12 + [0.0] * (whole - 12)
    page.locator("#later").click()
    assert place(page) == here + 1
    page.locator("#context").press("ArrowLeft")
    page.locator("#context").press("ArrowLeft")
    assert place(page) == here - 1
    assert page.locator("#plots .plot").count() == 2
    box = page.locator("#look").bounding_box()
    width = page.viewport_size["width"]  # type: ignore[index]
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    page.locator("#close").click()
    assert not page.locator("#look").is_visible() and not any(shades(page, ".message.assistant .t"))

    page.fill("#prompt", "And now?")
    page.locator("#send").click()
    page.wait_for_selector(".foot >> nth=1")
    assert page.locator(".message").count() == 4
    page.locator("#fresh").click()
    assert page.locator(".message").count() == 0 and page.locator("#empty").is_visible()


def keep_picture(page: "Page") -> None:
    """A screenshot in the folder named by FOVEAL_SCREENSHOTS, if it names one."""
    if folder := os.environ.get("FOVEAL_SCREENSHOTS"):
        size = page.viewport_size
        assert size is not None
        dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        page.screenshot(path=Path(folder) / f"page-{size['width']}-{'dark' if dark else 'light'}.png")


def shades(page: "Page", tokens: str = "#context .t") -> list[float]:
    """How deep each token's shade is, 0 to 1."""
    values = page.eval_on_selector_all(tokens, "all => all.map(token => token.style.getPropertyValue('--s'))")
    return [float(value or 0) for value in values]


def place(page: "Page") -> int:
    """Where the token that is looked at stands."""
    at = int(page.locator("#context .here").get_attribute("data-at") or -1)
    assert page.locator("#seen").inner_text() == str(at)
    return at


@pytest.mark.slow
def test_errors_and_stopping(browser: "Browser", address: str) -> None:
    """Guards against an error that nobody sees, a question that cannot be asked again, and a stream that cannot be
    stopped."""
    page = open_page(browser)
    page.goto(address)
    ask(page, length=5000)
    page.wait_for_selector(".wrong:has-text('max_tokens')")
    assert page.locator(".message.assistant").count() == 0
    page.click("#settings-button")
    page.fill("#max-tokens", "900")
    page.fill("#prompt", "again")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .t >> nth=3", state="attached")
    page.locator("#stop").click()
    page.wait_for_selector("#send")
    assert 3 < page.locator(".message.assistant .t").count() < 900
    page.uncheck("#selection")
    page.fill("#max-tokens", "5")
    page.fill("#prompt", "without")
    page.keyboard.press("Enter")
    page.wait_for_selector(".foot:has-text('5 tokens')")
    assert page.locator(".message.assistant").nth(1).locator("button").count() == 0, "there is nothing to look at"
    page.close()


@pytest.mark.slow
def test_models_without_an_indexer(browser: "Browser", tmp_path: Path) -> None:
    """Guards against an empty panel where there is no selection: the page says why, or shows the window."""
    for name, words in (("llama", "attends to every earlier token"), ("mistral", "window of the latest tokens")):
        tokens = save_words(byte_level("gpt-2"), tmp_path / name, TEMPLATE)
        make_oracle(name, tmp_path / name, vocab_size=tokens, num_hidden_layers=2, eos_token_id=None)
        with serving(LLM(tmp_path / name, dtype="float32"), api_keys=(KEY,)) as server:
            page = open_page(browser)
            page.goto(server.url)
            ask(page, length=30)
            page.locator(".foot button").click()
            assert words in page.locator("#verdict").inner_text()
            assert sum(shades(page)) == (24 if name == "mistral" else 0)
            page.close()


@pytest.mark.slow
def test_a_model_without_a_chat_template(browser: "Browser", tmp_path: Path) -> None:
    """Guards against a page that can do nothing with a base model: it continues a text, as it was typed."""
    tokens = save_words(byte_level("gpt-2"), tmp_path)
    make_oracle("deepseek_v32", tmp_path, vocab_size=tokens, max_position_embeddings=1024, eos_token_id=None)
    with serving(LLM(tmp_path, dtype="float32")) as server:
        page = open_page(browser)
        page.goto(server.url)
        page.wait_for_selector("#empty:has-text('Write a beginning.')")
        page.click("#settings-button")
        assert not page.locator("#system").is_visible()
        page.fill("#max-tokens", "20")
        page.click("#settings-button")
        for text in ("The naïve cat ", "And now"):
            count = page.locator(".foot").count()
            page.fill("#prompt", text)
            page.keyboard.press("Enter")
            page.wait_for_selector(f".foot >> nth={count}")
        assert page.locator(".wrong").count() == 0
        page.locator(".foot button >> nth=1").click()
        sequence = "".join(page.locator("#context .t").all_text_contents())
        page.close()
    assert sequence.startswith("<bos>The naïve cat " if "<bos>" in sequence else "The naïve cat ")
    assert "↵\n↵\nAnd now" in sequence
