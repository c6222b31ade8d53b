"""serve.py, asked by OpenAI's client: one server for all tests, which the script starts in a thread of this process."""

import base64
import functools
import http.server
import re
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from apps import endless
from PIL import Image

import serve
from lib.folders import TINY
from lib.loading import CLIP, UNSEEN
from lib.needles import make_sample
from lib.network import refuse_private_addresses

NEEDS = 'serve.py needs it: pip install -e ".[serve]"'
openai, uvicorn, _ = (pytest.importorskip(name, reason=NEEDS) for name in ("openai", "uvicorn", "fastapi"))
from lib import serving  # noqa: E402

pytestmark = pytest.mark.needs("fastapi", "openai", "uvicorn")
ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose files requests may name, with a clip of 8 s and a file beside it that they may not."""
    folder = tmp_path_factory.mktemp("serve") / "media"
    folder.mkdir()
    (folder.parent / "secret.mp4").touch()
    (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
    return folder


@pytest.fixture(scope="module")
def sample(folder):
    """The clip and its questions, which the tiny model answers."""
    return make_sample(folder / "clip", CLIP, (1, UNSEEN, 0))


@pytest.fixture(scope="module")
def server(folder):
    """What serve.py runs: the handler of its requests, and its address."""
    run = SimpleNamespace()

    def start(app, host, port, **options):
        run.server = uvicorn.Server(uvicorn.Config(app, host, 0, **options))  # 0: the first free port
        run.thread = threading.Thread(target=run.server.run)
        run.thread.start()
        while not run.server.started:
            time.sleep(0.01)
        run.url = f"http://{host}:{run.server.servers[0].sockets[0].getsockname()[1]}/v1"

    class Kept(serving.Handler):
        def __init__(self, *args):
            super().__init__(*args)
            run.handler = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "run", start)
        patch.setattr(serving, "Handler", Kept)
        options = ["--device", "cpu", "--media_folder", folder, "--private_urls", "--port", free_port()]
        patch.setattr(sys, "argv", ["serve.py", MODEL, *map(str, options)])
        serve.main()
    yield run
    run.server.should_exit = True
    run.thread.join()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def web(folder):
    """The address of the folder on a server of the web."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def free_port() -> int:
    with uvicorn.Config(None, "127.0.0.1", 0).bind_socket() as probe:
        return probe.getsockname()[1]


def ask(client, video, question, kind="video_url", **options):
    """A request about a video, or about text alone."""
    content = [{"type": kind, kind: {"url": str(video)}}] if video else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 8, **options})


def test_a_video_is_named_by_its_address_in_base64_or_by_a_file_of_the_folder(client, sample, web):
    video, (first, *_) = Path(sample["video"]), sample["questions"]
    data = f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"
    answers = [ask(client, source, first["question"]) for source in (f"{web}/{video.name}", data, video.name)]
    assert [answer.choices[0].message.content for answer in answers] == [first["answer"]] * 3
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}


def test_settings_of_a_request_are_those_of_the_processor(client, server, sample):
    kwargs = {"chat_template_kwargs": {"num_frames": 4, "frame_tokens": 16}}
    few = ask(client, sample["video"], "?", extra_body=kwargs).usage.prompt_tokens
    assert few < ask(client, sample["video"], "?").usage.prompt_tokens < server.handler.max_tokens == 8192


def test_an_image_is_read_by_its_address(client, web, folder):
    Image.new("RGB", (56, 84), "red").save(folder / "red.png")
    sizes = {ask(client, url, "?", "image_url").usage.prompt_tokens for url in (f"{web}/red.png", "red.png")}
    assert len(sizes) == 1 and sizes != {ask(client, None, "?").usage.prompt_tokens}


def test_the_client_of_the_page_streams_an_answer(client, server, sample, capsys):
    written = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/ecosystem.md").read_text(), re.MULTILINE | re.DOTALL)
    (snippet,) = (code for code in written if "OpenAI" in code)
    question = sample["questions"][0]
    for written, here in (
        ("http://127.0.0.1:8000/v1", server.url),
        ("VideoNSA-7B", MODEL),
        ("https://example.com/talk.mp4", sample["video"]),
        ("What is the talk about?", question["question"]),
    ):
        assert written in snippet
        snippet = snippet.replace(written, here)
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == question["answer"]

    chunks = list(ask(client, sample["video"], question["question"], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == question["answer"]
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens >= 1


def test_two_users_at_once_each_get_their_answer(client, sample):
    asked = sample["questions"][:2] * 2
    with ThreadPoolExecutor(4) as users:
        answers = list(users.map(lambda item: ask(client, sample["video"], item["question"]), asked))
    assert [answer.choices[0].message.content for answer in answers] == [item["answer"] for item in asked]


def refusals(sample, folder):
    """(part of a request, status, what is said of it)."""
    for path in ("/etc/hostname", "../secret.mp4", "link.mp4", f"file://{folder.parent}/secret.mp4"):
        yield {"video": path}, 400, "not in the folder whose files this server reads"
    for path in ("no.mp4", "rtmp://host/a"):
        yield {"video": path}, 400, f"{path}: no such file"
    yield {"video": "data:video/mp4;base64,AAAA"}, 400, "video/mp4;base64"
    yield {"kind": "audio_url", "video": "a"}, 400, "must be of type text, image_url, video_url"
    yield {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, '"text": "..."'
    yield {"messages": []}, 400, "messages must be a list of messages"
    for image in ("data:image/png;base64,AAAA", "data:image/png;base64,?"):
        yield {"kind": "image_url", "video": image}, 400, "data:image/png;base64"
    yield {"question": "word " * 9000}, 400, "tokens, more than this server's limit of 8,192"
    yield {"n": 2}, 422, "does not carry out: n"
    yield {"model": "gpt"}, 404, "this server has the model 'tiny', not 'gpt'"
    yield {"extra_body": {"fps": 4}}, 422, "Unexpected fields in the request: {'fps'}"
    for settings in ({"chat_template": "{{ 1 }}"}, {"images": "/etc/hostname"}, 3):
        yield {"extra_body": {"chat_template_kwargs": settings}}, 400, "chat_template_kwargs takes fps, num_frames"
    yield {"extra_body": {"chat_template_kwargs": {"max_tokens": 10**6}}}, 400, "max_tokens is at most 8192"
    yield {"extra_body": {"chat_template_kwargs": {"fps": -1}}}, 400, "fps must be"


def test_a_mistake_is_an_error_that_says_what_is_allowed(client, sample, folder):
    for request, status, said in refusals(sample, folder):
        with pytest.raises(openai.APIStatusError) as refused:
            ask(client, **{"video": sample["video"], "question": "?", **request})
        assert refused.value.status_code == status, request
        assert said in refused.value.body["message"], refused.value.body


def test_private_addresses_and_all_files_can_be_refused(client, server, web, sample, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refuse_private_addresses()
    for kind in ("video_url", "image_url"):
        with pytest.raises(openai.BadRequestError, match="in a private network"):
            ask(client, f"{web}/clip.mp4", "?", kind)
    monkeypatch.setattr(server.handler, "folder", None)
    with pytest.raises(openai.BadRequestError, match="reads no files, unless it is started with --media_folder"):
        ask(client, sample["video"], "?")


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_ends_when_its_client_leaves(client, server, monkeypatch, streamed):
    model = server.handler.model
    endless(server.handler, monkeypatch)
    steps = []
    handle = model.register_forward_hook(lambda *_: steps.append(time.sleep(0.01)))
    if streamed:
        with ask(client, None, "?", stream=True, max_tokens=10**5) as stream:
            assert any(chunk.choices[0].delta.content for chunk in stream)
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client, None, "?", max_tokens=10**5, timeout=0.5)
    # The thread that generates is free.
    server.handler.generation.submit(lambda: None).result(timeout=120)
    handle.remove()
    assert len(steps) < 10**4


def test_one_model_is_listed_and_nothing_else_is_served(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert sorted(route.path for route in server.server.config.app.routes) == [
        *("/health", "/v1/chat/completions", "/v1/models")
    ]
    assert server.server.config.host == "127.0.0.1"


def test_the_script_names_what_is_missing(server, monkeypatch, folder):
    taken = server.url.split(":")[2].removesuffix("/v1")
    for options, said in (
        (["--port", taken], f"--port {taken}: address already in use; name another one"),
        (["--media_folder", f"{folder}/no"], "no: there is no such folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve.py", MODEL, *options])
        with pytest.raises(SystemExit, match=re.escape(said)):
            serve.main()
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit, match=re.escape('serve.py: needs openai: pip install -e ".[serve]"')):
        serve.main()


def test_serve_of_transformers_looks_for_the_class_in_transformers():
    from transformers.cli.serving.model_manager import ModelManager

    with pytest.raises(AttributeError, match="VideoNSAForConditionalGeneration"):
        ModelManager(device="cpu", trust_remote_code=True, force_model=TINY)
