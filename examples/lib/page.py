"""The Gradio page of `app.py`: its controls, and what they call. Set Gradio's variables before importing this."""

from dataclasses import dataclass
from functools import partial
from html import escape

import gradio as gr

from .html import CSS, error_html, note_html, plan_html, sheet_html, timing_text
from .visits import MAX_QUESTION, QUESTIONS, App, Limits

TITLE = """\
<h1>Ask a long video</h1><p><b>VideoNSA</b> is Qwen2.5-VL whose vision tokens read only the blocks of a video that
matter to them, so that long videos fit. Model: {name}.{hint}</p>"""
TINY = " The tiny model knows coloured shapes that flash up, and nothing else: try an example clip."
PREFERENCES = [("frame size", "pixels"), ("number of frames", "frames"), ("both alike", "balanced")]


def serve(app: App, name: str, **options):
    """Serve the page of an app for the model `name`; returns what `Blocks.launch` returns."""
    return page(app, name).launch(
        allowed_paths=[],
        max_file_size=app.limits.megabytes * 10**6,
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        ssr_mode=False,
        **options,
    )


def page(app: App, name: str) -> gr.Blocks:
    events = Events(app)
    title = TITLE.format(name=escape(name), hint=TINY if app.examples else "")
    with gr.Blocks(title="VideoNSA", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.HTML(title, elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                source = Source.make(app, events.hint)
                sampling, new_tokens = make_sampling(app.limits)
            with gr.Column(scale=6, min_width=320):
                talk = Talk.make()
        sheet = gr.HTML("", elem_id="sheet")

        connect_source(source, sampling, talk, sheet, events)
        connect_talk(sampling, new_tokens, talk, sheet, events)
        blocks.unload(events.leave)
    return blocks.queue(max_size=app.limits.queue)


# ----------------------------------------------------------------------------------------------------------------------
# Controls
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Where a video comes from, and the panel that shows what would be read of it."""

    video: gr.Video
    url: gr.Textbox
    load: gr.Button
    make_clip: gr.Button
    panel: gr.HTML

    @classmethod
    def make(cls, app: App, hint: str) -> "Source":
        video = gr.Video(label="Video", sources=["upload"], height=260, elem_id="video")
        with gr.Row():
            url = gr.Textbox(
                placeholder="https://… of a video file", show_label=False, container=False, scale=4, elem_id="url"
            )
            load = gr.Button("Load", scale=1, min_width=70)
            make_clip = gr.Button(
                "Example clip", scale=2, min_width=110, visible=app.examples, variant="primary", elem_id="example"
            )
        return cls(video, url, load, make_clip, gr.HTML(hint, elem_id="plan"))


@dataclass
class Sampling:
    """Settings of the processor, under their names there."""

    fps: gr.Number
    max_pixels: gr.Number
    max_tokens: gr.Slider
    prefer: gr.Radio
    start: gr.Number
    end: gr.Number

    @property
    def controls(self) -> list:
        return list(vars(self).values())

    @classmethod
    def read(cls, values) -> dict:
        """Settings of the values of the controls; 0 and nothing stand for the default."""
        names = cls.__dataclass_fields__
        return {name: value or None for name, value in zip(names, values, strict=True)}


def make_sampling(limits: Limits) -> tuple[Sampling, gr.Slider]:
    """The settings of a video, and the longest answer."""
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        with gr.Row():
            fps = gr.Number(0, label="Frames per second (0: up to 4)", minimum=0, min_width=140)
            pixels = gr.Number(0, label="Pixels per frame (0: up to 50,176)", precision=0, min_width=140)
        with gr.Row():
            start = gr.Number(0, label="Start, seconds", min_width=140)
            end = gr.Number(0, label="End, seconds (0: of the video)", min_width=140)
        tokens = gr.Slider(2048, limits.tokens, limits.tokens, step=1024, label="Budget: tokens of video and text")
        prefer = gr.Radio(PREFERENCES, value="pixels", label="If the budget is short, keep")
        most = limits.new_tokens
        new_tokens = gr.Slider(1, most, min(128, most), step=1, label="Longest answer, tokens")
    return Sampling(fps, pixels, tokens, prefer, start, end), new_tokens


@dataclass
class Talk:
    """The conversation and what asks and stops."""

    chat: gr.Chatbot
    status: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    halt: gr.Button
    questions: gr.Dataset

    @classmethod
    def make(cls) -> "Talk":
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
        return cls(chat, status, question, ask, halt, questions)


# ----------------------------------------------------------------------------------------------------------------------
# Events
# ----------------------------------------------------------------------------------------------------------------------

HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
SLOW = {"api_visibility": "private", "concurrency_limit": 4}


def connect_source(source: Source, sampling: Sampling, talk: Talk, sheet, events: "Events") -> None:
    """What happens when a video is chosen, and when its settings change."""
    settings = sampling.controls
    changed = [source.video, source.panel, talk.chat, sheet, talk.status, talk.questions]  # see Events.change
    loading = [source.load.click, source.url.submit]

    source.video.upload(events.take, [source.video, *settings], changed, **SLOW, show_progress_on=source.panel)
    source.video.clear(events.clear, settings, changed, **HIDDEN)
    gr.on(loading, events.fetch, [source.url, *settings], changed, **SLOW, show_progress_on=source.video)
    source.make_clip.click(events.example, settings, changed, **SLOW, show_progress_on=source.video)
    gr.on(
        [control.change for control in settings],
        events.plan,
        settings,
        source.panel,
        **HIDDEN,
        trigger_mode="always_last",
        concurrency_limit=8,
    )


def connect_talk(sampling: Sampling, new_tokens, talk: Talk, sheet, events: "Events") -> None:
    """What happens when a question is asked, stopped or forgotten."""
    buttons = [talk.ask, talk.halt, talk.question]
    talk.questions.click(lambda sample: sample[0], talk.questions, talk.question, **HIDDEN)
    asking = gr.on([talk.ask.click, talk.question.submit], events.begin, None, buttons, **HIDDEN, queue=False)
    asking = asking.then(
        events.answer,
        [talk.question, new_tokens, *sampling.controls],
        [talk.chat, talk.question, sheet, talk.status],
        api_visibility="private",
        concurrency_limit=1,
        concurrency_id="model",
        show_progress_on=talk.chat,
    )
    asking.then(events.finish, None, buttons, **HIDDEN, queue=False)
    talk.halt.click(events.stop, None, None, **HIDDEN, queue=False)
    talk.chat.clear(events.forget, None, [sheet, talk.status], **HIDDEN, queue=False)


class Events:
    """What the controls call. Gradio passes the request of a visitor, and then the values of controls."""

    def __init__(self, app: App):
        self.app = app
        limit = f"{app.limits.seconds / 60:g} minutes and {app.limits.megabytes:,} MB"
        self.hint = note_html(f"A video of up to {limit}. What will be read of it is shown here.")

    def take(self, request: gr.Request, path, *values):
        return self.change(partial(self.app.take, request.session_hash, path), request, *values)

    def fetch(self, request: gr.Request, url, *values):
        return self.change(partial(self.app.fetch, request.session_hash, url), request, *values)

    def example(self, request: gr.Request, *values):
        return self.change(partial(self.app.make_example, request.session_hash), request, *values)

    def clear(self, request: gr.Request, *values):
        return self.change(partial(self.app.leave, request.session_hash), request, *values)

    def change(self, action, request: gr.Request, *values):
        """Video, panel, chat, sheet, status and questions after an action that changes the video."""
        visitor = request.session_hash
        before = self.app.visitors.get(visitor)
        try:
            action()
            panel = self.plan(request, *values)
        except ValueError as error:
            panel = error_html(str(error))
        found = self.app.visitors.get(visitor)
        if found is not None and found is before:  # what there was is still there
            return gr.skip(), panel, *[gr.skip()] * 4
        questions = [[text] for text in (found.questions if found else ())]
        return found and str(found.path), panel, [], "", "", gr.Dataset(samples=questions, visible=found is not None)

    def plan(self, request: gr.Request, *values) -> str:
        visitor = self.app.visitors.get(request.session_hash)
        if visitor is None:
            return self.hint
        try:
            return plan_html(self.app.plan(request.session_hash, **Sampling.read(values)), visitor.truth)
        except ValueError as error:
            return error_html(str(error))

    def begin(self, request: gr.Request):
        if visitor := self.app.visitors.get(request.session_hash):
            visitor.stop.clear()
        return gr.update(visible=False), gr.update(visible=True), gr.update(interactive=False)

    def finish(self):
        return gr.update(visible=True), gr.update(visible=False), gr.update(interactive=True)

    def answer(self, request: gr.Request, question, new_tokens, *values):
        """Yields chat, question, sheet and status while the answer grows."""
        app, visitor = self.app, request.session_hash
        try:
            for messages in app.ask(visitor, question, new_tokens, **Sampling.read(values)):
                yield messages, "", gr.skip(), note_html("Reading the video…") if len(messages) == 1 else ""
        except ValueError as error:
            yield app.messages(visitor), question, gr.skip(), error_html(str(error))
            return

        conversation = getattr(app.visitors.get(visitor), "conversation", None)
        if conversation is None or conversation.answer is None:
            yield app.messages(visitor), question, gr.skip(), note_html("Stopped before the first word.")
            return
        status = note_html(timing_text(conversation.answer.timing))
        yield app.messages(visitor), "", sheet_html(conversation), status

    def stop(self, request: gr.Request) -> None:
        self.app.stop(request.session_hash)

    def forget(self, request: gr.Request):
        self.app.forget(request.session_hash)
        return "", ""

    def leave(self, request: gr.Request) -> None:
        self.app.leave(request.session_hash)
