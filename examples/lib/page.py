"""The controls of the page of `app.py`; set Gradio's variables before importing this.

What the controls call is in `page_events.py`; `page.css` and `page.js` go with the page.
"""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from .html import examples_html, title_html, zone_note_html
from .page_events import Events
from .visits import MAX_QUESTION, QUESTIONS, App, Limits

FOLDER = Path(__file__).parent
PREFERENCES = [("frame size", "pixels"), ("number of frames", "frames"), ("both alike", "balanced")]
# A click on a picture tells which it was.
PICK = """
element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) trigger("click", { seed: button.dataset.seed });
});
"""


def serve(app: App, name: str, **options):
    """Serve the page of an app for the model `name`; returns what `Blocks.launch` returns."""
    return page(app, name).launch(
        allowed_paths=[],
        max_file_size=app.limits.megabytes * 10**6,
        css=(FOLDER / "page.css").read_text(),
        head=f"<script>{(FOLDER / 'page.js').read_text()}</script>",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        ssr_mode=False,
        **options,
    )


def page(app: App, name: str) -> gr.Blocks:
    events = Events(app, name)
    with gr.Blocks(title="Ask a long video", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.HTML(title_html(name, app.examples), elem_id="title")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                source = Source.make(app)
                sampling = Sampling.make(app.limits)
            with gr.Column(scale=6, min_width=320):
                talk = Talk.make()
        sheet = gr.HTML("", elem_id="sheet")

        events.connect(blocks, source, sampling, talk, sheet)
    return blocks.queue(max_size=app.limits.queue)


@dataclass
class Source:
    """Where a video comes from, the player, and the panel that shows what would be read of it."""

    chooser: gr.Column  # shown until there is a video, or where another is wanted
    zone: gr.File
    clips: gr.HTML
    url: gr.Textbox
    load: gr.Button
    back: gr.Button
    shown: gr.Column
    player: gr.HTML
    other: gr.Button
    panel: gr.HTML

    @classmethod
    def make(cls, app: App) -> "Source":
        limit = f"up to {app.limits.seconds / 60:g} minutes and {app.limits.megabytes:,} MB"
        with gr.Column(scale=0, elem_id="chooser") as chooser:
            zone = gr.File(label=f"Video, {limit}", elem_id="zone")
            gr.HTML(zone_note_html(app.limits.megabytes))
            with gr.Row():
                url = gr.Textbox(
                    placeholder="https://… of a video file", show_label=False, container=False, scale=4, elem_id="url"
                )
                load = gr.Button("Load", scale=1, min_width=70, elem_id="load")
            pictures = examples_html(app.example_clips()) if app.examples else ""
            clips = gr.HTML(pictures, js_on_load=PICK, visible=app.examples, elem_id="examples")
            back = gr.Button("Back to the video", size="sm", visible=False, elem_id="back")
        with gr.Column(scale=0, visible=False) as shown:
            player = gr.HTML("", elem_id="player")
            other = gr.Button("Another video", size="sm", elem_id="other")
        panel = gr.HTML("", elem_id="plan")
        return cls(chooser, zone, clips, url, load, back, shown, player, other, panel)


@dataclass
class Sampling:
    """The settings of a video and the longest answer. `controls` are named as the settings of the processor are."""

    box: gr.Accordion
    controls: dict[str, gr.Number | gr.Textbox | gr.Slider | gr.Radio]
    new_tokens: gr.Slider

    @classmethod
    def make(cls, limits: Limits) -> "Sampling":
        most = limits.new_tokens
        with gr.Accordion("Sampling", open=False, visible=False, elem_id="sampling") as box:
            with gr.Row():
                fps = gr.Number(0, label="Frames per second (0: up to 4)", minimum=0, min_width=140)
                pixels = gr.Number(0, label="Pixels per frame (0: the default)", precision=0, min_width=140)
            with gr.Row():
                start = gr.Textbox(label="Start (m:ss)", placeholder="0:00", min_width=140, elem_id="start")
                end = gr.Textbox(label="End (m:ss)", placeholder="end of the video", min_width=140, elem_id="end")
            tokens = gr.Slider(2048, limits.tokens, limits.tokens, step=1024, label="Budget: tokens of video and text")
            prefer = gr.Radio(PREFERENCES, value="pixels", label="If the budget is short, keep")
            new_tokens = gr.Slider(1, most, min(128, most), step=1, label="Longest answer, tokens")
        controls = {
            "fps": fps,
            "max_pixels": pixels,
            "max_tokens": tokens,
            "prefer": prefer,
            "start": start,
            "end": end,
        }
        return cls(box, controls, new_tokens)


@dataclass
class Talk:
    """The conversation and what asks and stops."""

    chat: gr.Chatbot
    status: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    halt: gr.Button
    questions: gr.Dataset
    save: gr.HTML

    @classmethod
    def make(cls) -> "Talk":
        chat = gr.Chatbot(
            label="Conversation",
            placeholder="Choose a video, then ask about it.",
            feedback_options=None,
            buttons=["copy", "copy_all"],
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
        save = gr.HTML("", elem_id="save")
        return cls(chat, status, question, ask, halt, questions, save)
