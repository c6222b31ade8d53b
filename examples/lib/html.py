"""The HTML of the page of `app.py`, without Gradio."""

import base64
import io
import math
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from videonsa.video_chat import Conversation
from videonsa.video_moments import Moment

from .times import clock

STRIP = 120  # cells, at most, of the strip that shows how much each part of a video was looked at


def title_html(model: str, tiny: bool) -> str:
    hint = " It knows coloured shapes that flash up, and nothing else." if tiny else ""
    return (
        "<h1>Ask a long video</h1><p>Choose a video, ask about it, and see which moments the model looked at. "
        f"Model: {escape(model)}.{hint}</p>"
    )


def zone_note_html(megabytes: int) -> str:
    """Where `page.js` says that a file is too large."""
    return f"<p id='too-large' class='vn-error' role='alert' data-megabytes='{megabytes}' hidden></p>"


def examples_html(clips: list[tuple[int, bytes]]) -> str:
    """Buttons for clips, each with its seed and a picture of it, and one for a new clip."""
    buttons = [
        f"<button data-seed='{seed}' aria-label='Example clip {i}'><img src='{data_uri(picture)}' alt=''></button>"
        for i, (seed, picture) in enumerate(clips, 1)
    ]
    title = note_html("Or try an example clip:")
    return f"{title}<div class='vn-examples'>{''.join(buttons)}<button data-seed=''>New clip</button></div>"


def player_html(path: Path | str) -> str:
    source = escape(quote(f"gradio_api/file={path}", safe="/=:"))
    cannot = "This browser cannot play the video. Questions about it work all the same."
    return (
        f"<video controls playsinline preload='metadata' src='{source}' aria-label='the video'></video>"
        f"<p class='vn-wait' hidden>{cannot}</p>"
    )


def wait_html(text: str) -> str:
    return f"<p class='vn-wait'>{escape(text)}</p>"


def save_html(name: str, text: str, data: str) -> str:
    """Links that save a conversation, which they contain."""
    links = [
        f"<a download='{escape(name)}.{ending}' href='{data_uri(content.encode(), kind)}'>{label}</a>"
        for ending, label, content, kind in (
            ("txt", "text", text, "text/plain;charset=utf-8"),
            ("json", "JSON", data, "application/json"),
        )
    ]
    return f"<p class='vn-save'>Save the conversation: {' · '.join(links)}</p>"


def plan_html(plan: dict[str, str], truth: str = "", forgets: bool = False) -> str:
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in plan.items())
    notes = [f"True of this clip: {truth}."] if truth else []
    if forgets:
        notes.append("Settings changed: the next question reads the video anew and begins a new conversation.")
    return f"<dl class='vn-plan'>{tiles}</dl>{''.join(map(note_html, notes))}"


def data_uri(content: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def error_html(message: str) -> str:
    return f"<p class='vn-error' role='alert'>{escape(message)}</p>"


def note_html(text: str) -> str:
    return f"<p class='vn-note'>{escape(text)}</p>" if text else ""


def timing_text(timing: dict[str, float]) -> str:
    read = f"{timing['given']:,} new tokens, {timing['cached']:,} found in the cache"
    if not timing["cached"]:
        read = f"Video read in {timing['reading']:.1f} s"
    speed = f", then {timing['speed']:.0f} tokens/s" if timing["tokens"] > 1 else ""
    return f"{read}; first token after {timing['first']:.2f} s{speed}."


def sheet_html(conversation: Conversation | None) -> str:
    """The moments that the last answer attended to and, folded away, those that vision tokens chose."""
    if conversation is None or conversation.answer is None or not conversation.answer.shares:
        return ""
    answer = conversation.answer
    text = "The frames that the words of the last answer attended to, with their share of its attention to the video."
    views = f"<h3>What the model looked at</h3>{view_html(text, answer.moments, answer.shares)}"
    if conversation.choices:
        text = (
            "Where vision tokens have more before them than they may read, they choose. These are the frames that they "
            "chose most, and how many of them did; no question changes that."
        )
        view = view_html(text, conversation.choices, conversation.choice_shares)
        views += f"<details><summary>What the vision tokens chose</summary>{view}</details>"
    return f"<section class='vn-sheet'>{views}</section>"


def view_html(text: str, moments: list[Moment], shares: list[float]) -> str:
    """Frames in the order of the video, which show their moment in the player, under a strip of the shares of all."""
    frames = []
    for moment in sorted(moments, key=lambda moment: moment.seconds):
        image, data = Image.fromarray(moment.frame), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(data, "JPEG", quality=85)
        when = clock(moment.seconds)
        frames.append(
            f"<button data-seconds='{moment.seconds:.3f}' title='Show this moment'>"
            f"<img src='{data_uri(data.getvalue())}' alt='frame at {when}'>{when} · {percent(moment.share)}</button>"
        )
    step = -(-len(shares) // STRIP)
    cells = [
        max((s for s in shares[i : i + step] if not math.isnan(s)), default=0) for i in range(0, len(shares), step)
    ]
    bars = "".join(f"<i style='opacity:{max(cell / max(max(cells), 1e-9), 0.04):.2f}'></i>" for cell in cells)
    strip = f"<div class='vn-strip' role='img' aria-label='the share of each part'>{bars}</div>"
    return f"<p>{text}</p>{strip}<div class='vn-frames'>{''.join(frames)}</div>"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
