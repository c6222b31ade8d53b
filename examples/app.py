"""A page on which to ask a VideoNSA model about a video; `pip install -e ".[app]"` installs what it needs.

    python examples/app.py                           # the tiny trained model
    python examples/app.py --model me/VideoNSA-7B
    python examples/app.py --write-space my-space    # a folder to upload as a Hugging Face Space

A video is uploaded or named by its address. What would be read of it is shown before it is read; answers are streamed
and can be stopped; later questions find the video in the model's cache. The files of visitors lie in one temporary
folder, which goes when the app ends, and go with them; no other file is served. The model's side of it is in
`conversation.py`. `--model` runs the code files of that repository (`trust_remote_code=True`).
"""

import argparse
import base64
import http.client
import importlib.metadata
import io
import ipaddress
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from PIL import Image

import convert
import demo
from card import requirements
from conversation import Conversation, VideoChat
from folders import check_new, new_folder
from make_needle_videos import make_sample
from videonsa import video_reader, video_source
from videonsa.video_inputs import file_metadata

HERE = Path(__file__).resolve().parent
SETTINGS = ("fps", "max_pixels", "max_tokens", "prefer", "start", "end")  # of the processor, as the page offers them
QUESTIONS = ("What happens in this video?", "Describe it in one sentence.", "What is shown at the end?")
MAX_QUESTION = 2000  # characters
STRIP = 120  # cells, at most, of the strip that shows how often each part of a video was chosen


@dataclass
class Limits:
    """What visitors may ask for: megabytes and seconds of a video, tokens of a prompt and of an answer, visitors whose
    video is kept, questions that wait, and seconds for a server to answer."""

    megabytes: int = 500
    seconds: float = 3600
    tokens: int = 128 * 1024
    new_tokens: int = 512
    visitors: int = 4
    queue: int = 20
    timeout: float = 30


@dataclass
class Visitor:
    """An open page: its video, all of whose frames `metadata` lists, and the conversation about it."""

    path: Path | None = None
    metadata: object = None
    truth: str = ""  # what is true of an example clip
    questions: tuple[str, ...] = QUESTIONS
    conversation: Conversation | None = None
    busy: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    seen: float = field(default_factory=time.monotonic)


class App:
    """What the page does, without the page. Its methods raise ValueError with what a visitor should read.

    Args:
        files: the folder where all videos lie.
        examples: whether the model knows the clips of `make_needle_videos.py`.
    """

    def __init__(self, chat: VideoChat, files: Path, limits: Limits | None = None, examples: bool = False):
        self.chat, self.files, self.limits, self.examples = chat, Path(files).resolve(), limits or Limits(), examples
        self.files.mkdir(parents=True, exist_ok=True)
        self.visitors: dict[str, Visitor] = {}
        self.lock = threading.Lock()
        self.pace = None  # seconds to the first token, per vision token, of the last video that was read
        video_source.MAX_DOWNLOAD = self.limits.megabytes * 10**6

    def take(self, visitor: str, path: str | Path, truth: str = "", questions: tuple[str, ...] = QUESTIONS) -> None:
        """Make an uploaded file the visitor's video, in place of another."""
        path = Path(path).resolve()
        if not path.is_relative_to(self.files) or not path.is_file():
            raise ValueError("This file was not uploaded here.")
        if self.visitors.get(visitor, Visitor()).path != path:
            self.leave(visitor)
        try:
            if path.stat().st_size > self.limits.megabytes * 10**6:
                raise ValueError(f"The file is larger than {self.limits.megabytes:,} MB, the limit.")
            with video_reader.VideoFile(str(path), max_seconds=self.limits.seconds) as file:
                metadata = replace(file_metadata(file), frame_times=file.times.tolist())
        except (OSError, ValueError) as error:
            self._remove(path)
            raise ValueError(str(error).replace(str(path), path.name)) from error
        with self.lock:
            self.visitors[visitor] = Visitor(path, metadata, truth, questions)
            idle = sorted((v.seen, name) for name, v in self.visitors.items() if not v.busy and name != visitor)
            crowd = [name for _, name in idle[: max(len(self.visitors) - self.limits.visitors, 0)]]
        for name in crowd:
            self.leave(name)

    def fetch(self, visitor: str, url: str) -> Path:
        """Download the visitor's video."""
        url = (url or "").strip()
        if not re.match(r"https?://[^/]", url, re.IGNORECASE):
            raise ValueError("An address must begin with http:// or https://.")
        name = re.sub(r"[^\w.-]+", "_", Path(unquote(urlsplit(url).path)).name).lstrip(".")[-100:] or "video.mp4"
        with video_source.download(url, urlsplit(url).hostname or name, self.limits.timeout, keep=False) as source:
            source.seek(0)
            path = Path(tempfile.mkdtemp(dir=self.files)) / name
            with path.open("wb") as file:
                shutil.copyfileobj(source, file)
        self.take(visitor, path)
        return path

    def make_example(self, visitor: str, seed: int | None = None) -> Path:
        """A clip that nobody has seen, with questions about it, as the visitor's video."""
        folder = Path(tempfile.mkdtemp(dir=self.files))
        seed = secrets.randbits(16) if seed is None else seed
        sample = make_sample(folder / "clip", demo.CLIP, (seed, demo.UNSEEN, 0))
        needle = sample["needles"][0]
        start, end = needle["seconds"][0]
        truth = f"{needle['colour']} {needle['shape']}, {needle['where']}, from {start:g} to {end:g} s"
        self.take(visitor, sample["video"], truth, tuple(item["question"] for item in sample["questions"]))
        return Path(sample["video"])

    def plan(self, visitor: str, **settings) -> dict[str, str]:
        """What a question would read of the visitor's video: a few words on each of its aspects."""
        found = self._visitor(visitor)
        settings, duration = self._settings(settings), found.metadata.duration
        plan = self.chat.processor.video_processor.plan(found.metadata, **settings)
        cache, pixels = self.chat.memory(plan)
        seconds = f"{plan.start:.1f} to {plan.end:.1f}"
        wait = f"; about {self.pace * plan.tokens:.1f} s to the first word" if self.pace else ""
        return {
            "Frames": f"{plan.num_frames:,} of {plan.width} × {plan.height}, {plan.fps:.3g} per second",
            "Tokens": f"{plan.tokens:,} of {plan.budget:,}",
            "Seconds": f"{seconds} of {duration:.1f}{wait}",
            "Memory": f"{size(cache)} of cache, {size(pixels)} of pixels",
            "Attention": f"{self.chat.model.config.attention_budget(plan.tokens):.1%} of the pairs of dense attention",
        }

    def ask(self, visitor: str, question: str, new_tokens: int = 128, **settings) -> Iterator[list[dict[str, str]]]:
        """Yield the conversation with the answer so far, as `messages`. Other settings start a new conversation.

        Raises:
            ValueError: also if there is no video, or a setting, the question or the conversation exceeds a limit.
        """
        found, question = self._visitor(visitor), (question or "").strip()
        settings, limits = self._settings(settings), self.limits
        if not question:
            raise ValueError("Type a question first.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question):,} characters, the limit is {MAX_QUESTION:,}.")
        if not 1 <= new_tokens <= limits.new_tokens:
            raise ValueError(f"An answer may have 1 to {limits.new_tokens} tokens, got {new_tokens}.")
        conversation = found.conversation
        if conversation is None or conversation.settings != settings or conversation.cache is None:
            conversation = Conversation(str(found.path), settings)
        elif len(conversation.ids) + new_tokens > limits.tokens:
            raise ValueError(f"The conversation has reached {limits.tokens:,} tokens, the limit. Start a new one.")
        conversation.stop = found.stop
        found.conversation, found.busy, found.seen = conversation, True, time.monotonic()
        before = [*self.messages(visitor), {"role": "user", "content": question}]
        try:
            yield before
            for text in self.chat.ask(conversation, question, int(new_tokens)):
                yield [*before, {"role": "assistant", "content": text}]
        except torch.OutOfMemoryError as error:
            raise ValueError("There is not enough memory for so many tokens. Allow fewer and ask again.") from error
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(found.path), found.path.name)) from error
        finally:
            found.busy, found.seen = False, time.monotonic()
        timing = conversation.timing
        if timing and not timing["cached"]:
            self.pace = (timing["reading"] + timing["first"]) / timing["given"]

    def stop(self, visitor: str) -> None:
        """End the answer that is being given to the visitor, or waits to be."""
        if visitor in self.visitors:
            self.visitors[visitor].stop.set()

    def forget(self, visitor: str) -> None:
        """Start a new conversation about the same video."""
        if visitor in self.visitors:
            self.visitors[visitor].conversation = None

    def leave(self, visitor: str) -> None:
        """Stop answering the visitor and remove the video."""
        with self.lock:
            gone = self.visitors.pop(visitor, None)
            # The same file uploaded twice is stored once.
            if gone is None or any(other.path == gone.path for other in self.visitors.values()):
                return
        gone.stop.set()
        self._remove(gone.path)

    def messages(self, visitor: str) -> list[dict[str, str]]:
        """The conversation so far, in words."""
        conversation = getattr(self.visitors.get(visitor), "conversation", None)
        turns = conversation.messages if conversation else []
        return [{"role": turn["role"], "content": turn["content"][-1]["text"]} for turn in turns]

    def _visitor(self, visitor: str) -> Visitor:
        if visitor not in self.visitors:
            raise ValueError("Choose a video first. (Videos of earlier visitors make room for those of later ones.)")
        return self.visitors[visitor]

    def _settings(self, settings: dict) -> dict:
        settings = {name: value for name, value in settings.items() if value is not None}
        settings |= {name: int(settings[name]) for name in ("max_pixels", "max_tokens") if name in settings}
        if settings.get("max_tokens", 0) > self.limits.tokens:
            raise ValueError(f"max_tokens may be {self.limits.tokens:,} at most, got {settings['max_tokens']:,}.")
        return {"max_tokens": self.limits.tokens, **settings, "max_duration": self.limits.seconds}

    def _remove(self, path: Path) -> None:
        if path.parent.parent == self.files:
            shutil.rmtree(path.parent, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def size(count: float) -> str:
    """Bytes, for people."""
    return next(
        f"{count / 1000**i:.3g} {unit}" for i, unit in ((3, "GB"), (2, "MB"), (1, "kB")) if count >= 1000**i or i == 1
    )


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def plan_html(plan: dict[str, str], truth: str = "") -> str:
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in plan.items())
    return f"<dl class='vn-plan'>{tiles}</dl>{note_html(f'True of this clip: {truth}.') if truth else ''}"


def error_html(message: str) -> str:
    return f"<p class='vn-error' role='alert'>{escape(message)}</p>"


def note_html(text: str) -> str:
    return f"<p class='vn-note'>{escape(text)}</p>"


def timing_text(timing: dict[str, float]) -> str:
    read = f"{timing['given']:,} new tokens, {timing['cached']:,} found in the cache"
    if not timing["cached"]:
        read = f"Video read in {timing['reading']:.1f} s"
    speed = f", then {timing['speed']:.0f} tokens/s" if timing["tokens"] > 1 else ""
    return f"{read}; first token after {timing['first']:.2f} s{speed}."


def sheet_html(conversation: Conversation | None, released: bool = False) -> str:
    """The contact sheet: the moments that vision tokens chose most, above all of the video."""
    if conversation is None or not conversation.moments:
        return ""
    figures = []
    for moment in conversation.moments:
        image, data = Image.fromarray(moment.frame), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(data, "JPEG", quality=85)
        source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        share = "" if moment.share is None else f" · {moment.share:.0%}"
        when = clock(moment.seconds)
        figures.append(
            f"<figure><img src='{source}' alt='frame at {when}'><figcaption>{when}{share}</figcaption></figure>"
        )
    shares = conversation.shares
    if all(map(math.isnan, shares)):
        reason = (
            "no vision token had to choose what to read" if not released else "choices of this variant are not counted"
        )
        text, strip = f"Frames of the video ({reason}):", ""
    else:
        text = (
            "Where vision tokens have more before them than they may read, the selection branch chooses. These are the "
            "moments that they chose most, and how many of them did."
        )
        step = -(-len(shares) // STRIP)
        cells = [
            max((s for s in shares[i : i + step] if not math.isnan(s)), default=0) for i in range(0, len(shares), step)
        ]
        bars = "".join(f"<i style='opacity:{max(cell / max(max(cells), 1e-9), 0.04):.2f}'></i>" for cell in cells)
        strip = f"<div class='vn-strip' role='img' aria-label='how often each part was chosen'>{bars}</div>"
    frames = f"<div>{''.join(figures)}</div>"
    return f"<section class='vn-sheet'><h3>What the model looked at</h3><p>{text}</p>{strip}{frames}</section>"


CSS = """
.gradio-container { max-width: 1240px !important; margin: auto; }
.html-container { padding: 0 !important; }
#video button[aria-label^="Trim"], #video button[aria-label^="Reset"] { display: none; }
#title h1 { margin: 0; } #title p { margin: .25rem 0 0; }
.vn-plan { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; font-size: .9rem; }
.vn-plan div { display: contents; } .vn-plan dd { margin: 0; font-variant-numeric: tabular-nums; }
.vn-plan dt { opacity: .75; }
.vn-note { font-size: .85rem; opacity: .75; margin: .4rem 0 0; }
.vn-error { border-left: 4px solid #dc2626; background: #dc262618; border-radius: 4px; padding: .5rem .75rem; margin: 0;
    overflow-wrap: anywhere; }
.vn-sheet h3 { margin: 0; }
.vn-sheet p { font-size: .85rem; opacity: .75; margin: .2rem 0 .5rem; }
.vn-sheet > div:last-child { display: grid; gap: .5rem;
    grid-template-columns: repeat(auto-fill, minmax(min(130px, 30%), 1fr)); }
.vn-sheet figure { margin: 0; } .vn-sheet img { width: 100%; border-radius: 6px; display: block; }
.vn-sheet figcaption { font-size: .8rem; text-align: center; font-variant-numeric: tabular-nums; }
.vn-strip { display: flex; height: 10px; border-radius: 5px; overflow: hidden; margin-bottom: .5rem;
    border: 1px solid var(--border-color-primary); }
.vn-strip i { flex: 1; background: var(--color-accent); }
"""


def page(app: App, name: str):
    """The Gradio page of an app for the model `name`."""
    import gradio as gr  # here, so that all above can be used and tested without it

    limits, released = app.limits, app.chat.model.config.nsa_variant == "released"
    limit = f"{limits.seconds / 60:g} minutes and {limits.megabytes:,} MB"
    hint = note_html(f"A video of up to {limit}. What will be read of it is shown here.")

    def guarded(action, request, *values):
        """Video, panel, chat, sheet, status and questions after an action that changes the video."""
        visitor = request.session_hash
        before = app.visitors.get(visitor)
        try:
            action()
            panel = plan(request, *values)
        except ValueError as error:
            panel = error_html(str(error))
        found = app.visitors.get(visitor)
        if found is not None and found is before:  # what there was is still there
            return gr.skip(), panel, *[gr.skip()] * 4
        questions = [[text] for text in (found.questions if found else ())]
        return found and str(found.path), panel, [], "", "", gr.Dataset(samples=questions, visible=found is not None)

    def plan(request: gr.Request, *values):
        visitor = app.visitors.get(request.session_hash)
        if visitor is None:
            return hint
        try:
            return plan_html(app.plan(request.session_hash, **read_settings(values)), visitor.truth)
        except ValueError as error:
            return error_html(str(error))

    def take(request: gr.Request, path, *values):
        return guarded(partial(app.take, request.session_hash, path), request, *values)

    def fetch(request: gr.Request, url, *values):
        return guarded(partial(app.fetch, request.session_hash, url), request, *values)

    def example(request: gr.Request, *values):
        return guarded(partial(app.make_example, request.session_hash), request, *values)

    def leave(request: gr.Request):
        app.leave(request.session_hash)

    def clear(request: gr.Request, *values):
        return guarded(partial(app.leave, request.session_hash), request, *values)

    def begin(request: gr.Request):
        if visitor := app.visitors.get(request.session_hash):
            visitor.stop.clear()
        return gr.update(visible=False), gr.update(visible=True), gr.update(interactive=False)

    def finish():
        return gr.update(visible=True), gr.update(visible=False), gr.update(interactive=True)

    def answer(request: gr.Request, question, new_tokens, *values):
        visitor = request.session_hash
        try:
            for messages in app.ask(visitor, question, new_tokens, **read_settings(values)):
                yield messages, "", gr.skip(), note_html("Reading the video…") if len(messages) == 1 else ""
        except ValueError as error:
            yield app.messages(visitor), question, gr.skip(), error_html(str(error))
            return
        conversation = getattr(app.visitors.get(visitor), "conversation", None)
        if conversation is not None and conversation.timing:
            yield (
                app.messages(visitor),
                "",
                sheet_html(conversation, released),
                note_html(timing_text(conversation.timing)),
            )
        else:
            yield app.messages(visitor), question, gr.skip(), note_html("Stopped before the first word.")

    def stop(request: gr.Request):
        app.stop(request.session_hash)

    def forget(request: gr.Request):
        app.forget(request.session_hash)
        return "", ""

    def read_settings(values):
        return {name: value or None for name, value in zip(SETTINGS, values, strict=True)}

    tiny = (
        " The tiny model knows coloured shapes that flash up, and nothing else: try an example clip."
        if app.examples
        else ""
    )
    with gr.Blocks(title="VideoNSA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.HTML(
            "<h1>Ask a long video</h1><p><b>VideoNSA</b> is Qwen2.5-VL whose vision tokens read only the blocks of a "
            f"video that matter to them, so that long videos fit. Model: {escape(name)}.{tiny}</p>",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                video = gr.Video(label="Video", sources=["upload"], height=260, elem_id="video")
                with gr.Row():
                    url = gr.Textbox(
                        placeholder="https://… of a video file",
                        show_label=False,
                        container=False,
                        scale=4,
                        elem_id="url",
                    )
                    load = gr.Button("Load", scale=1, min_width=70)
                    make = gr.Button(
                        "Example clip",
                        scale=2,
                        min_width=110,
                        visible=app.examples,
                        variant="primary",
                        elem_id="example",
                    )
                panel = gr.HTML(hint, elem_id="plan")
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    with gr.Row():
                        fps = gr.Number(0, label="Frames per second (0: up to 4)", minimum=0, min_width=140)
                        pixels = gr.Number(0, label="Pixels per frame (0: up to 50,176)", precision=0, min_width=140)
                    with gr.Row():
                        start = gr.Number(0, label="Start, seconds", min_width=140)
                        end = gr.Number(0, label="End, seconds (0: of the video)", min_width=140)
                    budget = gr.Slider(
                        2048, limits.tokens, limits.tokens, step=1024, label="Budget: tokens of video and text"
                    )
                    prefer = gr.Radio(
                        [("frame size", "pixels"), ("number of frames", "frames"), ("both alike", "balanced")],
                        value="pixels",
                        label="Where the budget is short, keep",
                    )
                    new_tokens = gr.Slider(
                        1, limits.new_tokens, min(128, limits.new_tokens), step=1, label="Longest answer, tokens"
                    )
            with gr.Column(scale=6, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation",
                    height=360,
                    placeholder="Choose a video, then ask about it.",
                    feedback_options=None,
                    buttons=[],
                    elem_id="chat",
                )
                status = gr.HTML("", elem_id="status")
                with gr.Row():
                    question = gr.Textbox(
                        placeholder="Ask about the video…",
                        show_label=False,
                        container=False,
                        scale=6,
                        max_length=MAX_QUESTION,
                        elem_id="question",
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                    halt = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False, elem_id="stop")
                questions = gr.Dataset(
                    components=[gr.Textbox(visible=False)],
                    samples=[[text] for text in QUESTIONS],
                    label="Ask for example",
                    type="values",
                    visible=False,
                    elem_id="questions",
                )
        sheet = gr.HTML("", elem_id="sheet")

        settings = [fps, pixels, budget, prefer, start, end]  # as in SETTINGS
        changed = [video, panel, chat, sheet, status, questions]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        slow = {"api_visibility": "private", "concurrency_limit": 4}
        video.upload(take, [video, *settings], changed, **slow, show_progress_on=panel)
        video.clear(clear, settings, changed, **hidden)
        gr.on([load.click, url.submit], fetch, [url, *settings], changed, **slow, show_progress_on=video)
        make.click(example, settings, changed, **slow, show_progress_on=video)
        gr.on(
            [control.change for control in settings], plan, settings, panel,
            **hidden, trigger_mode="always_last", concurrency_limit=8,
        )  # fmt: skip
        questions.click(lambda sample: sample[0], questions, question, **hidden)
        asking = gr.on([ask.click, question.submit], begin, None, [ask, halt, question], **hidden, queue=False)
        asking = asking.then(
            answer,
            [question, new_tokens, *settings],
            [chat, question, sheet, status],
            api_visibility="private",
            concurrency_limit=1,
            concurrency_id="model",
            show_progress_on=chat,
        )
        asking.then(finish, None, [ask, halt, question], **hidden, queue=False)
        halt.click(stop, None, None, **hidden, queue=False)
        chat.clear(forget, None, [sheet, status], **hidden, queue=False)
        blocks.unload(leave)
    return blocks.queue(max_size=limits.queue)


def launch(app: App, name: str, **options):
    """Serve the page; returns what `Blocks.launch` returns."""
    # Before Gradio is imported: its cache is the folder of the app, and it is to ask no server for news.
    os.environ.update(GRADIO_TEMP_DIR=str(app.files), GRADIO_ANALYTICS_ENABLED="False")
    import gradio as gr

    blocks = page(app, name)
    return blocks.launch(
        allowed_paths=[],
        max_file_size=app.limits.megabytes * 10**6,
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        ssr_mode=False,
        **options,
    )


class PublicHTTPConnection(http.client.HTTPConnection):
    """A connection to a public address, or none."""

    def connect(self):
        super().connect()
        check_public(self)


class PublicHTTPSConnection(http.client.HTTPSConnection):
    def connect(self):
        super().connect()
        check_public(self)


class PublicHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, request):
        return self.do_open(PublicHTTPConnection, request)

    def https_open(self, request):
        return self.do_open(PublicHTTPSConnection, request)


def check_public(connection) -> None:
    # Of the connection, not of the name, which may stand for another address the next time it is looked up.
    address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    if not (getattr(address, "ipv4_mapped", None) or address).is_global:
        connection.close()
        raise ValueError(f"{connection.host} is in a private network, which this app does not read from")


def refuse_private_addresses() -> None:
    """Let `urllib.request.urlopen` connect to public addresses only, also where it is redirected."""
    urllib.request.install_opener(urllib.request.build_opener(PublicHandler))


SPACE = """\
---
title: VideoNSA
emoji: 🎞️
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
pinned: false
license: apache-2.0
short_description: Ask a long video, with Native Sparse Attention
---

# Ask a long video

[VideoNSA](https://arxiv.org/abs/2510.02295) is Qwen2.5-VL whose vision tokens attend through Native Sparse Attention.
This Space asks the tiny model that ships with the project, which knows coloured shapes only and runs on a CPU. For
another model, set the variable `MODEL` to its id (and choose a GPU); the code files of that repository are run.
"""


def write_space(folder: str | Path) -> Path:
    """Write a folder to upload as a Space: the app, what it imports, the tiny model, README.md and requirements.txt.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    folder = check_new(folder)
    with new_folder(folder) as partial_folder:
        for path in with_imports(HERE / "app.py"):
            shutil.copyfile(path, partial_folder / path.name)
        shutil.copytree(HERE / "tiny", partial_folder / "tiny")
        (partial_folder / "videonsa").mkdir()
        convert.copy_code(partial_folder / "videonsa")
        shutil.copyfile(HERE.parent / "LICENSE", partial_folder / "LICENSE")
        (partial_folder / "README.md").write_text(SPACE.format(gradio=importlib.metadata.version("gradio")))
        # The Space installs Gradio itself, by `sdk_version`.
        lines = sorted(need for need in requirements("app") if not need.startswith("gradio"))
        (partial_folder / "requirements.txt").write_text("\n".join(lines) + "\n")
    return folder


def with_imports(script: Path) -> set[Path]:
    """A script and the files beside it that it imports, directly or not."""
    found, waiting = set(), [script]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
            waiting += [other for name in names if (other := script.with_name(f"{name}.py")).is_file()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Limits()
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL"),
        help="folder or Hub id of a VideoNSA repository (default: the variable MODEL, or the tiny trained one)",
    )
    parser.add_argument(
        "--variant", help="what vision tokens compute: paper, released, merged or dense (default: the checkpoint's)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help='or "auto" (default: %(default)s)'
    )
    parser.add_argument("--host", help="address to serve on; 0.0.0.0 is all of this machine's (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    parser.add_argument("--max-megabytes", type=int, default=default.megabytes, help="of a video (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=default.seconds, help="of a video (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=default.tokens, help="of a prompt (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=default.new_tokens, help="of an answer (%(default)s)")
    parser.add_argument(
        "--visitors", type=int, default=default.visitors, help="whose video and cache are kept at a time (%(default)s)"
    )
    parser.add_argument("--queue", type=int, default=default.queue, help="questions that may wait (%(default)s)")
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds for a server (%(default)s)")
    parser.add_argument("--private-urls", action="store_true", help="read from private networks and this machine, too")
    parser.add_argument("--write-space", metavar="FOLDER", help="write a folder to upload as a Space, and end")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a polite kill must clean up as Ctrl-C does
    try:
        importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        sys.exit('app.py: needs Gradio: pip install -e ".[app]"')
    try:
        if args.write_space:
            folder = write_space(args.write_space)
            print(f"wrote {folder}; upload it with: hf upload --repo-type space NAME {folder}")
            return
        with tempfile.TemporaryDirectory(prefix="videonsa-app-") as folder:
            source = args.model or str(demo.assemble_tiny_model(Path(folder) / "tiny-videonsa"))
            chat = VideoChat(*demo.load(source, args.variant, args.device))
            limits = Limits(
                args.max_megabytes, args.max_seconds, args.max_tokens, args.max_new_tokens, args.visitors, args.queue,
                args.timeout,
            )  # fmt: skip
            if not args.private_urls:
                refuse_private_addresses()
            app = App(chat, Path(folder) / "files", limits, examples=not args.model)
            launch(app, args.model or "tiny VideoNSA", server_name=args.host, server_port=args.port)
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")


if __name__ == "__main__":
    main()
