"""What visitors of the app can and cannot do; in a browser, too, where Gradio, Playwright and Chromium are there."""

import functools
import http.server
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import yaml

import app as app_module
from lib import tiny
from lib.card import requirements
from lib.html import plan_html, sheet_html, timing_text
from lib.loading import CLIP, UNSEEN, assemble_tiny_model, load
from lib.needles import make_sample
from lib.network import refuse_private_addresses
from lib.space import write_space
from lib.visits import App, Limits
from videonsa import video_source
from videonsa.video_chat import VideoChat

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return VideoChat(*load(str(assemble_tiny_model(tmp_path_factory.mktemp("tiny") / "model")), None, "cpu"))


@pytest.fixture
def app(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(video_source, "MAX_DOWNLOAD", video_source.MAX_DOWNLOAD)  # an app sets it
    return App(chat, tmp_path / "files", examples=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=4)


def upload(app, clip, folder="upload"):
    path = app.files / folder / clip.name
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(clip, path)
    return path


def listing(app):
    return sorted(str(path.relative_to(app.files)) for path in app.files.rglob("*") if path.is_file())


def test_the_plan_follows_the_settings_and_says_why_it_cannot(app):
    app.make_example("a", seed=1)
    plan = app.plan("a")
    assert plan["Frames"] == "32 of 112 × 112, 4 per second" and plan["Tokens"] == "256 of 130,048"
    assert plan["Seconds"] == "0.0 to 8.0 of 8.0" and plan["Memory"] == "262 kB of cache, 4.82 MB of pixels"
    assert plan["Attention"].startswith("67.1%")
    plan = app.plan("a", fps=2, max_pixels=84 * 84, max_tokens=4096, prefer="frames", start=2, end=6, text=None)
    assert plan["Frames"] == "8 of 84 × 84, 2 per second" and plan["Tokens"] == "36 of 3,072"
    assert plan["Seconds"] == "2.0 to 6.0 of 8.0"
    for settings, message in (
        ({"start": 9}, "start=9 and end=None leave nothing"),
        ({"fps": 4, "max_tokens": 1100, "max_pixels": 112 * 112}, "leaves 76 for the video"),
        ({"fps": -1}, "fps must be a positive number"),
        ({"max_tokens": 2**20}, "max_tokens may be 131,072 at most, got 1,048,576"),
        ({"prefer": "speed"}, "prefer must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            app.plan("a", **settings)
    html = plan_html(plan, "<b>")
    assert "8 of 84 × 84" in html and "&lt;b&gt;" in html
    with pytest.raises(ValueError, match="Choose a video first"):
        app.plan("b")


def test_answers_are_streamed_and_later_ones_find_the_video_in_the_cache(app):
    sample = make_sample(app.files / "known", CLIP, (1, UNSEEN, 0))
    app.make_example("a", seed=1)
    assert app.visitors["a"].questions == tuple(item["question"] for item in sample["questions"])
    assert sample["needles"][0]["colour"] in app.visitors["a"].truth
    said = []
    for i, item in enumerate(sample["questions"]):
        *_, messages = app.ask("a", item["question"])
        said += [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
        assert messages == said == app.messages("a")
        conversation = app.visitors["a"].conversation
        assert ("found in the cache" in timing_text(conversation.answer.timing)) == (i > 0)
    assert "s to the first word" in app.plan("a")["Seconds"]
    sheet = sheet_html(conversation)
    moments = len(conversation.answer.moments) + len(conversation.choices)
    assert sheet.count("<figure>") == sheet.count("data:image/jpeg;base64,") == moments > 8
    assert sheet.count("<i ") == 2 * 16
    *_, messages = app.ask("a", "What appeared?", fps=1)  # other settings
    assert len(messages) == 2 and app.visitors["a"].conversation is not conversation
    app.forget("a")
    assert app.messages("a") == [] and len(list(app.ask("a", "What appeared?", fps=1))[-1]) == 2
    app.make_example("a", seed=2)
    assert app.messages("a") == []


def test_limits_are_told_and_kept(app, clip):
    app.limits = Limits(megabytes=1, seconds=3, tokens=4096, new_tokens=16, visitors=2)
    with pytest.raises(ValueError, match="clip.mp4: 4 seconds long, the limit is 3$"):
        app.take("a", upload(app, clip))
    big = upload(app, clip)
    with big.open("ab") as file:
        file.truncate(1_000_001)
    with pytest.raises(ValueError, match="larger than 1 MB"):
        app.take("a", big)
    assert listing(app) == []
    app.limits.seconds = 4
    app.take("a", upload(app, clip))
    for question, tokens, message in (
        ("  ", 16, "Type a question first"),
        ("why " * 600, 16, "2,399 characters, the limit is 2,000"),
        ("why", 17, "1 to 16 tokens, got 17"),
        ("why", 0, "1 to 16 tokens, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(app.ask("a", question, tokens))
    list(app.ask("a", "What appeared?", 16))
    app.limits.new_tokens = 4096
    with pytest.raises(ValueError, match="has reached 4,096 tokens, the limit. Start a new one"):
        next(app.ask("a", "What appeared?", 4000))


def test_the_visitor_who_waits_longest_makes_room(app, clip):
    app.limits.visitors = 2
    for visitor in "abc":
        app.take(visitor, upload(app, clip, visitor))
    assert set(app.visitors) == {"b", "c"} and listing(app) == ["b/clip.mp4", "c/clip.mp4"]
    app.visitors["b"].busy = True
    app.take("d", upload(app, clip, "d"))
    assert set(app.visitors) == {"b", "d"}
    with pytest.raises(ValueError, match="make room for those of later ones"):
        next(app.ask("a", "What appeared?"))


def test_bad_files_are_named_without_their_folder_and_removed(app, clip):
    for name, content, message in (
        ("notes.mp4", b"no video" * 100, "^notes.mp4: cannot be read as a video"),
        ("empty.mp4", b"", "^empty.mp4: the file is empty"),
        ("half.mp4", clip.read_bytes()[: clip.stat().st_size // 2], "^half.mp4: "),
        ("list.mp4", b"#EXTM3U\n/etc/passwd", "^list.mp4: a list or description of other files"),
    ):
        path = upload(app, clip)
        path.unlink()
        path = path.with_name(name)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            app.take("a", path)
        assert str(app.files) not in str(caught.value) and not path.exists() and "a" not in app.visitors


def test_only_uploaded_files_are_taken(app, clip):
    upload(app, clip)
    for path in (clip, "/etc/passwd", app.files / "upload/../../../clip.mp4", app.files, app.files / "no-such.mp4", ""):
        with pytest.raises(ValueError, match="was not uploaded here"):
            app.take("a", path)
    assert clip.exists() and listing(app) == ["upload/clip.mp4"]


def test_files_go_with_the_last_visitor_who_has_them(app, clip):
    path = upload(app, clip)
    app.take("a", path)
    app.take("a", path)
    app.take("b", path)
    app.make_example("c")
    assert len(listing(app)) == 2
    app.leave("a")
    assert path.exists()
    app.make_example("b")  # takes its place
    assert not path.exists()
    for visitor in "bcd":
        app.leave(visitor)
    assert listing(app) == [] and not list(app.files.iterdir())


def test_who_leaves_is_not_answered_any_further(app, clip, monkeypatch):
    app.take("a", upload(app, clip))
    config = app.chat.model.generation_config
    monkeypatch.setattr(config, "suppress_tokens", [*config.suppress_tokens, config.eos_token_id])
    monkeypatch.setattr(config, "eos_token_id", 10**6)
    answer = app.ask("a", "What appeared?", 512)
    assert next(answer)[-1]["role"] == "user" and next(answer)[-1]["role"] == "assistant"
    conversation = app.visitors["a"].conversation
    app.leave("a")
    list(answer)
    assert 0 < conversation.answer.timing["tokens"] < 512


@pytest.fixture
def server(clip):
    """Address of a server of the folder of `clip`, on which /slow never answers and /file redirects to a file."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow.mp4":
                time.sleep(1)
            elif self.path == "/file.mp4":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=clip.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_video_is_fetched_within_the_limits(app, server, clip):
    path = app.fetch("a", f" {server}/clip.mp4?token=1 ")
    assert (
        path.name == "clip.mp4" and path.read_bytes() == clip.read_bytes() and app.plan("a")["Seconds"].endswith("4.0")
    )
    with pytest.raises(ValueError, match="cannot be downloaded: .*404"):
        app.fetch("a", f"{server}/none.mp4")
    app.limits.timeout = 0.2
    with pytest.raises(ValueError, match="timed out"):
        app.fetch("a", f"{server}/slow.mp4")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        app.fetch("a", f"{server}/file.mp4")
    video_source.MAX_DOWNLOAD = 1000
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        app.fetch("a", f"{server}/clip.mp4")
    assert app.visitors["a"].path == path and len(listing(app)) == 1  # what there was stays
    app.leave("a")
    assert not list(app.files.iterdir())


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "ftp://host/a.mp4", "data:video/mp4;base64,AA", "http:///a", "", None]
)
def test_only_web_addresses_are_fetched(app, url):
    with pytest.raises(ValueError, match="must begin with http"):
        app.fetch("a", url)


def test_private_addresses_are_refused(app, server, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refuse_private_addresses()
    for url in (f"{server}/clip.mp4", server.replace("127.0.0.1", "localhost")):
        with pytest.raises(ValueError, match="in a private network, which this app does not read from"):
            app.fetch("a", url)
    assert not list(app.files.iterdir())


def test_a_written_space_runs_its_own_files(tmp_path, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "6.31.0" if name == "gradio" else version(name))
    space = write_space(tmp_path / "space")
    card = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert card["sdk"] == "gradio" and card["sdk_version"] == "6.31.0" and (space / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60
    needs = (space / "requirements.txt").read_text().splitlines()
    assert set(needs) == {need for need in requirements("app") if not need.startswith("gradio")}
    with pytest.raises(FileExistsError):
        write_space(space)
    program = (
        "import json, app, pathlib, lib.loading as loading, videonsa.video_reader as reader\n"
        "chat = app.VideoChat(*loading.load(str(loading.assemble_tiny_model(pathlib.Path('model'))), None, 'cpu'))\n"
        "page = app.App(chat, 'files')\n"
        "page.make_example('a', seed=1)\n"
        "print(json.dumps([app.__file__, reader.__file__, list(page.ask('a', 'What appeared?'))[-1]]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=space,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *files, messages = json.loads(done.stdout)
    assert files == [str(space / "app.py"), str(space / "videonsa/video_reader.py")] and len(messages) == 2


@pytest.fixture(scope="module")
def served(chat, tmp_path_factory):
    """A running app whose model takes its time, and the address of its page."""
    gradio = pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
    app = App(chat, tmp_path_factory.mktemp("served") / "files", Limits(megabytes=1), examples=True)
    handle = chat.model.register_forward_hook(lambda *_: time.sleep(0.05))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # launch() sets them
        _, url, _ = app_module.launch(app, "<tiny>", prevent_thread_lock=True, quiet=True)
        yield app, url
        gradio.close_all(verbose=False)
    handle.remove()


def status(url) -> int:
    try:
        with urllib.request.urlopen(url) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_outside_of_the_cache_is_served(served, tmp_path):
    app, url = served
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    inside = app.make_example("x")
    model = app.chat.model.config._name_or_path
    assert status(f"{url}gradio_api/file={inside}") == 200
    for path in (
        "/etc/passwd", secret, f"{app.files}/../secret.txt", f"{inside.parent}/../../../../../../../../etc/passwd",
        f"{inside.parent}/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "examples/app.py",
        "setup.cfg", f"{model}/config.json",
    ):  # fmt: skip
        assert status(f"{url}gradio_api/file={path}") in (403, 404), path
    app.leave("x")
    assert status(f"{url}gradio_api/file={inside}") == 403


def test_a_large_upload_is_refused_by_the_server(served):
    import httpx  # Gradio's own

    app, url = served
    for size, expected in ((900_000, 200), (1_100_000, 413)):
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("a.mp4", bytes(size))})
        assert answer.status_code == expected
    (path,) = listing(app)
    (app.files / path).unlink()


def call(server, page: dict, name: str, session: str, **given) -> list:
    """What an event of the page returns, as a browser would ask for it; controls have their first values or `given`."""
    number, event = next((i, x) for i, x in enumerate(page["dependencies"]) if x["api_name"] == name)
    values = {component["id"]: component["props"].get("value") for component in page["components"]}
    ids = {component["props"].get("elem_id"): component["id"] for component in page["components"]}
    values |= {ids[control]: value for control, value in given.items()}
    data = {"data": [values[i] for i in event["inputs"]], "fn_index": number, "session_hash": session}
    request = urllib.request.Request(
        f"{server}gradio_api/queue/join", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{server}gradio_api/queue/data?session_hash={session}") as stream:
        messages = (json.loads(line[5:]) for line in stream if line.startswith(b"data:"))
        done = next(message for message in messages if message["msg"] == "process_completed")
    assert done["success"], done
    return done["output"]["data"]


def test_the_events_of_the_page_reach_the_app(served):
    app, url = served
    with urllib.request.urlopen(f"{url}config") as response:
        page = json.load(response)
    assert "A video of up to" in call(url, page, "plan", "me")[0]

    video, panel, _, _, _, questions = call(url, page, "example", "me")
    assert video["orig_name"] == "clip.mp4" and "256 of" in panel and questions["visible"]
    chat, question, sheet, status = call(url, page, "answer", "me", question="What appeared?")
    assert question == "" and "first token after" in status
    conversation = app.visitors["me"].conversation
    assert sheet.count("<figure>") == len(conversation.answer.moments) + len(conversation.choices) > 8
    assert [turn["role"] for turn in chat] == ["user", "assistant"] and len(app.messages("me")) == 2

    assert "Type a question" in call(url, page, "answer", "me", question=" ")[3]
    assert call(url, page, "fetch", "me", url="file:///etc/passwd")[1].startswith("<p class='vn-error'")
    assert call(url, page, "clear", "me")[0] is None and "me" not in app.visitors


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="needs Playwright: pip install playwright")
def test_a_visit_in_a_browser(served, clip, tmp_path, monkeypatch):
    from playwright.sync_api import expect, sync_playwright

    app, url = served
    config = app.chat.model.generation_config
    bad = tmp_path / "holiday.mp4"
    bad.write_text("no video")
    big = tmp_path / "big.mp4"
    big.write_bytes(bytes(1_100_000))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        outside = []
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.goto(url)
        plan, chat = page.locator("#plan"), page.locator("#chat")
        question = page.locator("#question").locator("input, textarea")
        expect(page.locator("#title")).to_contain_text("Model: <tiny>")
        expect(plan).to_contain_text("What will be read of it is shown here")

        def choose(path):
            page.set_input_files("#video input[type=file]", str(path))

        choose(bad)
        expect(plan.get_by_role("alert")).to_contain_text("holiday.mp4: cannot be read as a video")
        question.fill("Anything?")
        page.click("#ask")
        expect(page.locator("#status").get_by_role("alert")).to_contain_text("Choose a video first")
        expect(question).to_have_value("Anything?")

        choose(clip)
        expect(plan).to_contain_text("16 of 224 × 224, 4 per second")
        page.click("#sampling button")
        page.get_by_label("End, seconds (0: of the video)").fill("2")
        expect(plan).to_contain_text("0.0 to 2.0 of 4.0")
        expect(plan).to_contain_text("8 of 224 × 224")

        page.evaluate(
            "window.seen = []; new MutationObserver(() => {"
            "    for (const bot of document.querySelectorAll('#chat .bot.message')) window.seen.push(bot.innerText)"
            "}).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true})"
        )
        monkeypatch.setattr(config, "suppress_tokens", [*config.suppress_tokens, config.eos_token_id])
        monkeypatch.setattr(config, "eos_token_id", 10**6)
        question.fill("What appeared?")
        question.press("Enter")
        page.wait_for_function("new Set(window.seen).size > 4")  # it is streamed
        page.click("#stop")
        expect(page.locator("#ask")).to_be_visible()
        expect(page.locator("#status")).to_contain_text("Video read in")
        assert app.visitors and len(app.messages(next(iter(app.visitors)))[-1]["content"].split()) < 120
        expect(page.locator("#sheet figure").first).to_be_visible()
        monkeypatch.undo()

        question.fill("What colour was the star?")
        page.click("#ask")
        expect(page.locator("#status")).to_contain_text("found in the cache")
        expect(chat.locator(".message.user")).to_have_count(2)
        page.locator("#url").locator("input, textarea").fill("file:///etc/passwd")
        page.get_by_role("button", name="Load").click()
        expect(plan.get_by_role("alert")).to_contain_text("must begin with http")
        expect(chat.locator(".message.user")).to_have_count(2)  # the conversation is still there
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

        page.click("#example")
        expect(plan).to_contain_text("True of this clip")
        expect(chat.locator(".message.user")).to_have_count(0)
        page.locator("#questions button").first.click()
        expect(question).to_have_value(app.visitors[next(iter(app.visitors))].questions[0])
        page.click("#video [aria-label=Clear]")
        expect(plan).to_contain_text("What will be read of it is shown here")
        choose(big)
        expect(page.locator(".toast-body")).to_contain_text("exceed the maximum allowed size")
        assert not outside
        page.click("#example")
        expect(plan).to_contain_text("True of this clip")
        page.close()
        deadline = time.monotonic() + 20
        while (app.visitors or listing(app)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not app.visitors and not listing(app)
        browser.close()
