"""What was asked about a video and answered: as messages of a chat, as text and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from .times import clock

EMPTY = "*(The model gave an empty answer.)*"
ANEW = "---\n*The model reads the video anew. It does not remember what stands above.*"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        settings: of the processor, with which the video was read.
        remembered: tokens of earlier turns in the model's cache; 0 where a conversation begins.
        moments: of the video that the model looked at, each as (seconds, share or None).
    """

    question: str
    answer: str = ""
    settings: dict = field(default_factory=dict)
    remembered: int = 0
    moments: list[tuple[float, float | None]] = field(default_factory=list)
    asked: str = field(default_factory=now)


def as_messages(turns: list[Turn], open_turn: Turn | None = None) -> list[dict[str, str]]:
    """Messages of a chat; of an open turn without an answer, the question only."""
    messages = []
    for turn in [*turns, *([open_turn] if open_turn else [])]:
        if messages and not turn.remembered:
            messages.append({"role": "assistant", "content": ANEW})
        messages.append({"role": "user", "content": turn.question})
        if turn.answer.strip():
            messages.append({"role": "assistant", "content": turn.answer})
        elif turn is not open_turn:
            messages.append({"role": "assistant", "content": EMPTY})
    return messages


def as_text(turns: list[Turn], video: str, seconds: float, model: str) -> str:
    lines = [f"{video}, {clock(seconds)}", f"Model: {model}"]
    for i, turn in enumerate(turns):
        lines.append("")
        if i and not turn.remembered:
            lines += ["(The model reads the video anew.)", ""]
        lines += [f"Q: {turn.question}", f"A: {turn.answer.strip() or '(empty)'}"]
        if turn.moments:
            shares = (f"{clock(when)}" + ("" if share is None else f" ({share:.0%})") for when, share in turn.moments)
            lines.append(f"   Looked at: {', '.join(shares)}")
    return "\n".join(lines) + "\n"


def as_json(turns: list[Turn], video: str, seconds: float, model: str) -> str:
    listed = []
    for turn in turns:
        fields = asdict(turn)
        fields["moments"] = [{"seconds": when, "share": share} for when, share in turn.moments]
        fields["starts"] = not fields.pop("remembered")
        listed.append(fields)
    return json.dumps({"video": video, "seconds": seconds, "model": model, "turns": listed}, indent=2) + "\n"
