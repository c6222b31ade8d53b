"""The HTML of the page of `app.py`, without Gradio."""

import base64
import io
import math
from html import escape

from PIL import Image

from videonsa.video_chat import Conversation
from videonsa.video_moments import Moment

STRIP = 120  # cells, at most, of the strip that shows how much each part of a video was looked at


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


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


def sheet_html(conversation: Conversation | None) -> str:
    """The contact sheet: the moments that the last answer attended to and, below, those that vision tokens chose."""
    if conversation is None or conversation.answer is None:
        return ""
    answer = conversation.answer
    views = view_html(
        "What the answer looked at",
        "The frames that the words of the last answer attended to, with their share of its attention to the video.",
        answer.moments,
        answer.shares,
    )
    if conversation.choices:
        views += view_html(
            "What the vision tokens chose",
            "Where vision tokens have more before them than they may read, they choose. These are the frames that they "
            "chose most, and how many of them did; no question changes that.",
            conversation.choices,
            conversation.choice_shares,
        )
    return f"<section class='vn-sheet'>{views}</section>"


def view_html(title: str, text: str, moments: list[Moment], shares: list[float]) -> str:
    """Frames in the order of the video, under a strip that shows the shares of all of it."""
    figures = []
    for moment in sorted(moments, key=lambda moment: moment.seconds):
        image, data = Image.fromarray(moment.frame), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(data, "JPEG", quality=85)
        source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        when = clock(moment.seconds)
        figures.append(
            f"<figure><img src='{source}' alt='frame at {when}'>"
            f"<figcaption>{when} · {percent(moment.share)}</figcaption></figure>"
        )
    step = -(-len(shares) // STRIP)
    cells = [
        max((s for s in shares[i : i + step] if not math.isnan(s)), default=0) for i in range(0, len(shares), step)
    ]
    bars = "".join(f"<i style='opacity:{max(cell / max(max(cells), 1e-9), 0.04):.2f}'></i>" for cell in cells)
    strip = f"<div class='vn-strip' role='img' aria-label='the share of each part'>{bars}</div>"
    return f"<h3>{title}</h3><p>{text}</p>{strip}<div class='vn-frames'>{''.join(figures)}</div>"


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
.vn-frames + h3 { margin-top: 1rem; }
.vn-frames { display: grid; gap: .5rem;
    grid-template-columns: repeat(auto-fill, minmax(min(130px, 30%), 1fr)); }
.vn-sheet figure { margin: 0; } .vn-sheet img { width: 100%; border-radius: 6px; display: block; }
.vn-sheet figcaption { font-size: .8rem; text-align: center; font-variant-numeric: tabular-nums; }
.vn-strip { display: flex; height: 10px; border-radius: 5px; overflow: hidden; margin-bottom: .5rem;
    border: 1px solid var(--border-color-primary); }
.vn-strip i { flex: 1; background: var(--color-accent); }
"""
