"""The page of `app.py` in a browser, where Gradio, Playwright and Chromium are there."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import pytest
from apps import endless, listing, make_chat, serving

from lib import tiny
from lib.transcript import EMPTY
from lib.visits import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="needs Playwright: pip install playwright"),
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_chat(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(chat, tmp_path_factory):
    with serving(chat, tmp_path_factory.mktemp("served"), Limits(megabytes=1, linger=5)) as served:
        yield served


@pytest.fixture
def visit(served):
    """A page at its address, which asks nobody else for anything; and after it, no file is left."""
    from playwright.sync_api import expect, sync_playwright

    app, url = served
    outside, problems = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.locator("#zone").wait_for()
        yield page
        assert not outside and not problems
        page.close()
        deadline = time.monotonic() + 40
        while (app.visitors or listing(app)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not app.visitors and not listing(app)
        browser.close()


def choose(page, path) -> None:
    page.set_input_files("#zone input[type=file]", str(path))


def ask(page, text: str | None = None) -> None:
    """Ask what is typed, or the question that stands there, and wait for the end of the answer."""
    messages = page.locator("#chat .message.user")
    count = messages.count()
    if text is not None:
        page.locator("#question").locator("input, textarea").fill(text)
    page.click("#ask")
    messages.nth(count).wait_for()
    page.locator("#ask").wait_for()


def test_files_that_cannot_be_taken_say_so_and_the_next_one_can(visit, served, tmp_path):
    from playwright.sync_api import expect

    page = visit
    bad, big = tmp_path / "holiday.mp4", tmp_path / "big.mp4"
    bad.write_text("no video")
    big.write_bytes(bytes(1_100_000))
    clip = tiny.make_clip(tmp_path / "clip.mp4", seconds=4)
    expect(page.locator("#title")).to_contain_text("Model: <tiny>")

    choose(page, big)
    expect(page.locator("#too-large")).to_have_text("big.mp4 has 2 MB; the limit is 1 MB.")
    expect(page.locator("#zone")).to_contain_text("Click to Upload")
    expect(page.get_by_text("Error", exact=True)).to_have_count(0)
    choose(page, bad)
    expect(page.locator("#plan").get_by_role("alert")).to_contain_text("holiday.mp4: cannot be read as a video")
    expect(page.locator("#too-large")).to_be_hidden()
    expect(page.locator("#zone")).to_contain_text("Click to Upload")
    page.locator("#question").locator("input, textarea").fill("Anything?")
    page.click("#ask")
    expect(page.locator("#status").get_by_role("alert")).to_contain_text("Choose a video first")
    expect(page.locator("#question").locator("input, textarea")).to_have_value("Anything?")

    choose(page, clip)
    expect(page.locator("#plan")).to_contain_text("16 of 224 × 224, 4 per second")
    expect(page.locator("#zone")).to_be_hidden()
    page.click("#other")
    page.locator("#url").locator("input, textarea").fill("file:///etc/passwd")
    page.click("#load")
    expect(page.locator("#plan").get_by_role("alert")).to_contain_text("must begin with http")
    page.click("#back")
    expect(page.locator("#player video")).to_be_visible()


def test_a_video_that_browsers_cannot_play_gets_a_preview(visit, tmp_path):
    from playwright.sync_api import expect

    page = visit
    page.evaluate(
        "window.seen = ''; new MutationObserver(() => { window.seen += document.body.innerText })"
        "    .observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    choose(page, tiny.make_clip(tmp_path / "old.mp4", seconds=4, codec="mpeg4"))
    expect(page.locator("#player video")).to_be_visible()
    page.wait_for_function("document.querySelector('#player video').readyState >= 2")
    assert page.evaluate("document.querySelector('#player video').duration") == pytest.approx(4, abs=0.2)
    seen = page.evaluate("window.seen")
    assert "Preparing a preview" in seen and "playable" not in seen and "Error" not in seen


def test_answers_are_shown_with_their_moments_and_saved(visit, served, monkeypatch):
    from playwright.sync_api import expect

    page, (app, _) = visit, served
    messages = page.locator("#chat .message.user")
    page.locator("#examples button").nth(1).click()
    expect(page.locator("#plan")).to_contain_text("True of this clip: cyan moon")
    page.locator("#questions button").first.click()
    (visitor,) = app.visitors
    expect(page.locator("#question").locator("input, textarea")).to_have_value(app.visitors[visitor].questions[0])
    ask(page)
    expect(page.locator("#chat")).to_contain_text("moon")
    expect(page.locator("#status")).to_contain_text("Video read in")

    best = app.visitors[visitor].conversation.answer.moments[0]
    page.locator(f"#sheet [data-seconds='{best.seconds:.3f}']").first.click()
    page.wait_for_function(f"document.querySelector('#player video').currentTime == {best.seconds:.3f}")
    expect(page.locator("#sheet summary")).to_have_text("What the vision tokens chose")
    assert " 0%" not in page.locator("#sheet").inner_text()

    before = page.locator("#sheet").inner_html()
    ask(page, "What colour was the moon?")
    expect(page.locator("#status")).to_contain_text("found in the cache")
    expect(messages).to_have_count(2)
    assert page.locator("#sheet").inner_html() != before
    turns = app.visitors[visitor].turns
    again = turns[-1]
    page.locator("#chat [aria-label=Retry]").last.click()
    deadline = time.monotonic() + 60
    while (len(turns) < 2 or turns[-1] is again) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert turns[-1] is not again and turns[-1].answer == again.answer
    page.locator("#ask").wait_for()
    expect(messages).to_have_count(2)

    with page.expect_download() as download:
        page.get_by_role("link", name="JSON").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert [turn["question"] for turn in saved["turns"]][1:] == ["What colour was the moon?"]
    assert saved["turns"][0]["moments"][0]["seconds"] == best.seconds

    # An empty answer, and one with other settings.
    config = app.chat.model.generation_config
    monkeypatch.setattr(config, "forced_eos_token_id", config.eos_token_id)
    page.click("#sampling button")
    page.locator("#end").locator("input, textarea").fill("0:04")
    expect(page.locator("#plan")).to_contain_text("0:00 to 0:04 of 0:08")
    expect(page.locator("#plan")).to_contain_text("begins a new conversation")
    page.get_by_label("Longest answer").first.fill("1")
    ask(page, "And before?")
    expect(page.locator("#chat")).to_contain_text("The model reads the video anew")
    expect(page.locator("#chat")).to_contain_text(EMPTY.strip("*"))
    expect(messages).to_have_count(3)

    page.reload()
    expect(messages).to_have_count(3)
    expect(page.locator("#plan")).to_contain_text("0:00 to 0:04 of 0:08")
    expect(page.locator("#player video")).to_be_visible()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_answer_is_streamed_and_stopped(visit, served, monkeypatch):
    from playwright.sync_api import expect

    page, (app, _) = visit, served
    endless(app.chat, monkeypatch)
    page.locator("#examples button").last.click()
    expect(page.locator("#plan")).to_contain_text("True of this clip")
    page.evaluate(
        "window.seen = []; new MutationObserver(() => {"
        "    for (const bot of document.querySelectorAll('#chat .bot.message')) window.seen.push(bot.innerText)"
        "}).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true})"
    )
    question = page.locator("#question").locator("input, textarea")
    question.fill("What appeared?")
    question.press("Enter")
    page.wait_for_function("new Set(window.seen).size > 4")  # it is streamed
    page.click("#stop")
    page.locator("#ask").wait_for()
    (visitor,) = app.visitors
    assert len(app.messages(visitor)[-1]["content"].split()) < 120

    # A page that is loaded again in the middle of an answer has what was said, and can ask on.
    question.fill("And then?")
    question.press("Enter")
    page.wait_for_function("document.querySelectorAll('#chat .bot.message').length > 1")
    page.reload()
    expect(page.locator("#chat .message.user")).to_have_count(2)
    monkeypatch.undo()
    ask(page, "What appeared?")
    expect(page.locator("#chat .message.user")).to_have_count(3)
