"""What visitors of the app can and cannot do; `test_app_browser.py` opens its page in a browser."""

import functools
import http.server
import importlib.metadata
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import forks
import pytest
import yaml
from apps import Client, endless, listing, make_chat, serving
from PIL import Image

import app as script
from lib import tiny, zero_gpu
from lib.card import requirements
from lib.html import plan_html, sheet_html, timing_text
from lib.loading import CLIP, UNSEEN
from lib.needles import make_sample
from lib.network import refuse_private_addresses
from lib.space import write_space
from lib.transcript import ANEW, EMPTY
from lib.visits import App, Limits
from videonsa import video_source


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_chat(tmp_path_factory.mktemp("tiny"))


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


def test_the_plan_follows_the_settings_and_says_why_it_cannot(app):
    app.make_example("a", seed=1)
    plan = app.plan("a")
    assert plan["Frames"] == "32 of 112 × 112, 4 per second" and plan["Tokens"] == "256 of 130,048"
    assert plan["Time"] == "0:00 to 0:08 of 0:08" and plan["Memory"] == "262 kB of cache, 4.82 MB of pixels"
    assert plan["Attention"].startswith("67.1%")
    plan = app.plan("a", fps=2, max_pixels=84 * 84, max_tokens=4096, prefer="frames", start=2, end=6, text=None)
    assert plan["Frames"] == "8 of 84 × 84, 2 per second" and plan["Tokens"] == "36 of 3,072"
    assert plan["Time"] == "0:02 to 0:06 of 0:08"
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
    assert "s to the first word" in app.plan("a")["Time"]
    sheet = sheet_html(conversation)
    for shown in (conversation.answer.moments, conversation.choices):
        assert min(moment.share for moment in shown) >= shown[0].share / 4
    moments = len(conversation.answer.moments) + len(conversation.choices)
    assert sheet.count("data-seconds=") == sheet.count("data:image/jpeg;base64,") == moments > 8
    assert sheet.count("<i ") == 2 * 16
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
    with pytest.raises(ValueError, match="Yours made room for one of a later visitor"):
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
    endless(app.chat, monkeypatch)
    answer = app.ask("a", "What appeared?", 512)
    assert next(answer)[-1]["role"] == "user" and next(answer)[-1]["role"] == "assistant"
    conversation = app.visitors["a"].conversation
    app.leave("a")
    list(answer)
    assert 0 < conversation.answer.timing["tokens"] < 512


def test_other_settings_begin_a_new_conversation_below_the_last(app):
    app.make_example("a", seed=1)
    list(app.ask("a", "What appeared?"))
    first = app.visitors["a"].conversation
    assert not app.forgets("a") and app.forgets("a", fps=1)
    *_, messages = app.ask("a", "What appeared?", fps=1)
    assert [message["content"] for message in messages[2:4]] == [ANEW, "What appeared?"] and len(messages) == 5
    assert app.visitors["a"].conversation is not first and not app.forgets("a", fps=1)


def test_an_empty_answer_says_so(app, monkeypatch):
    app.make_example("a", seed=1)
    config = app.chat.model.generation_config
    monkeypatch.setattr(config, "forced_eos_token_id", config.eos_token_id)  # of the last token that is allowed
    *_, messages = app.ask("a", "What appeared?", 1)
    assert messages[-1] == {"role": "assistant", "content": EMPTY} and app.visitors["a"].turns[0].answer == ""


def test_an_answer_is_tried_again_as_if_it_had_not_been_given(app):
    app.make_example("a", seed=1)
    with pytest.raises(ValueError, match="no answer to try again"):
        app.retract("a")
    questions = app.visitors["a"].questions
    *_, whole = [list(app.ask("a", question))[-1] for question in questions]
    conversation = app.visitors["a"].conversation
    ids = conversation.ids.tolist()
    for _ in range(2):
        assert app.retract("a") == questions[-1] and len(app.messages("a")) == len(whole) - 2
        assert list(app.ask("a", questions[-1]))[-1] == whole and conversation.ids.tolist() == ids
        assert app.visitors["a"].conversation is conversation and conversation.answer.timing["cached"] > 256
    for _ in questions:
        app.retract("a")
    assert app.messages("a") == [] and list(app.ask("a", questions[0]))[-1] == whole[:2]
    assert conversation.answer.timing["cached"] >= 256  # the video stays read


def test_who_waits_sees_how_many_are_before_and_can_stop(app, clip, monkeypatch):
    for visitor in "ab":
        app.take(visitor, upload(app, clip, visitor))
    list(app.ask("a", "What appeared?"))  # tells how long it takes
    endless(app.chat, monkeypatch)
    answering = app.ask("a", "And then?", 512)
    next(answering)
    waiting = app.ask("b", "What appeared?", 8)
    assert next(waiting)[-1]["role"] == "user"
    assert app.visitors["b"].notice.startswith("Waiting for 1 other question: about ")
    app.stop("b")
    assert list(waiting)[-1] == [] and app.visitors["b"].notice == "Stopped while waiting."
    app.stop("a")
    list(answering)
    app.begin("b")
    assert len(list(app.ask("b", "What appeared?", 8))[-1]) == 2


def test_a_page_that_is_loaded_again_finds_its_conversation(app, clip):
    app.limits.linger = 0.3
    app.take("a", upload(app, clip))
    said = list(app.ask("a", "What appeared?"))[-1]
    app.part("a")
    assert app.rejoin("b", "a") is app.visitors["b"] and app.rejoin("c", "a") is None
    time.sleep(0.5)
    assert app.messages("b") == said and listing(app) == ["upload/clip.mp4"]
    app.part("b")
    time.sleep(0.5)
    assert not app.visitors and listing(app) == []


def test_a_bad_file_leaves_the_video_that_there_was(app, clip):
    app.take("a", upload(app, clip))
    list(app.ask("a", "What appeared?"))
    bad = app.files / "bad" / "bad.mp4"
    bad.parent.mkdir()
    bad.write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match=r"^bad\.mp4: cannot be read"):
        app.take("a", bad)
    assert len(app.messages("a")) == 2 and app.visitors["a"].path.exists() and not bad.exists()


def test_browsers_get_a_copy_of_what_they_cannot_play(app, tmp_path):
    path = upload(app, tiny.make_clip(tmp_path / "old.mp4", seconds=2, codec="mpeg4"))
    app.take("a", path)
    assert app.visitors["a"].shown is None
    assert list(app.make_preview("a"))[-1] == 1
    assert app.visitors["a"].shown.name == "old.mp4.preview.mp4" and len(listing(app)) == 2
    app.leave("a")
    assert listing(app) == []


def test_example_clips_are_shown_by_what_is_found_in_them(app):
    clips = app.example_clips((1, 2))
    assert [seed for seed, _ in clips] == [1, 2] and listing(app) == []
    for _, picture in clips:
        assert Image.open(io.BytesIO(picture)).size == (168, 168)


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
    assert path.name == "clip.mp4" and path.read_bytes() == clip.read_bytes() and app.plan("a")["Time"].endswith("0:04")
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
        with pytest.raises(ValueError, match="in a private network, which this server does not read from"):
            app.fetch("a", url)
    with pytest.raises(ValueError, match="127.0.0.1: an address redirects to ftp, which is not read"):
        urllib.request.urlopen("ftp://127.0.0.1/clip.mp4")
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
        "chat = app.VideoChat(*loading.load(str(loading.assemble_tiny_model(pathlib.Path('model'))), 'cpu'))\n"
        "page = app.App(chat, 'files')\n"
        "page.make_example('a', seed=1)\n"
        "print(json.dumps([app.__file__, reader.__file__, list(page.ask('a', 'What appeared?'))[-1]]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = forks.run("-c", program, cwd=space, env={**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    *files, messages = json.loads(done.stdout)
    assert files == [str(space / "app.py"), str(space / "videonsa/video_reader.py")] and len(messages) == 2


def test_with_zero_gpu_only_what_can_be_pickled_comes_back(app, monkeypatch):
    app.make_example("a", seed=1)
    question = app.visitors["a"].questions[0]
    *_, said = app.ask("a", question)
    best = app.visitors["a"].turns[0].moments[0]

    def lend(duration):  # as spaces.GPU does, which calls a function in another process
        def decorate(task):
            def call(*args):
                for value in task(*pickle.loads(pickle.dumps(args))):
                    yield pickle.loads(pickle.dumps(value))

            return call

        return decorate

    assert not zero_gpu.is_zero_gpu()
    monkeypatch.setattr(zero_gpu, "spaces", SimpleNamespace(GPU=lend))
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert zero_gpu.is_zero_gpu()
    lent = App(zero_gpu.LentChat(app.chat), app.files / "lent", examples=True)
    lent.make_example("a", seed=1)
    assert list(lent.ask("a", question))[-1] == said
    assert lent.visitors["a"].turns[0].moments[0] == best and sheet_html(lent.visitors["a"].conversation)
    *_, messages = lent.ask("a", question)
    assert messages == [*said, {"role": "assistant", "content": ANEW}, *said]
    lent.stop("a")
    assert list(lent.ask("a", question))[-1] == messages and lent.visitors["a"].notice.startswith("Stopped")


@pytest.fixture(scope="module")
def served(chat, tmp_path_factory):
    with serving(chat, tmp_path_factory.mktemp("served"), Limits(megabytes=1)) as served:
        yield served


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


def test_the_events_of_the_page_reach_the_app(served):
    app, url = served
    me = Client(url, "me")
    assert me("plan").plan == ""

    seen = me("example", {"seed": "1"})
    assert "clip.mp4" in seen.player and "256 of" in seen.plan and seen.questions["visible"]
    seen = me("answer", question="What appeared?")
    assert "first token after" in seen.status and seen.sheet.count("data-seconds=") > 8
    assert seen.save.count("<a download='clip-conversation.") == 2
    assert len(app.messages("me")) == 2

    assert "Type a question" in me("answer", question=" ").status
    assert "is no time" in me("plan", end="soon").plan
    assert "0:00 to 0:02 of 0:08" in me("plan", end="0:02").plan and "new conversation" in me("plan", end="0:02").plan
    assert me("fetch", url="file:///etc/passwd").plan.startswith("<p class='vn-error'")
    again = Client(url, "again")("enter", former="me")
    assert "clip.mp4" in again.player and "me" not in app.visitors
    app.leave("again")


def test_the_console_says_where_the_page_is_and_nothing_else(tmp_path):
    pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-u", script.__file__, "--host", "127.0.0.1"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "Loading the tiny model.\n"
            assert process.stdout.readline().startswith("prompts of up to ")
            line = process.stdout.readline()
            assert line.startswith("Open http://127.0.0.1:") and line.endswith("in a browser; Ctrl-C ends it.\n")
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert rest == "" and "Traceback" not in errors and process.returncode == 0, errors
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_said_before_the_model_is_loaded(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["app.py", "--model", "nowhere/nothing", "--port", str(port)])
        with pytest.raises(SystemExit, match=f"--port {port}: address already in use"):
            script.main()


def test_a_space_takes_its_model_from_its_variable(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["app.py", "--write_space", str(tmp_path / "space"), "--model", "me/model"])
    with pytest.raises(SystemExit, match="--write_space takes no --model"):
        script.main()
    assert not (tmp_path / "space").exists()
