"""The Gradio page of `app.py`: its HTML, its controls and what they call."""

import base64
import io
import math
import os
from functools import partial
from html import escape

from PIL import Image

from .conversation import Conversation
from .visits import MAX_QUESTION, QUESTIONS, App

SETTINGS = ("fps", "max_pixels", "max_tokens", "prefer", "start", "end")  # of the processor, as the page offers them
STRIP = 120  # cells, at most, of the strip that shows how often each part of a video was chosen


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
