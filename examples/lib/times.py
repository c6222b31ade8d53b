"""Times as people write them: 1:30 of a video, 90 seconds of waiting."""

import re


def clock(seconds: float) -> str:
    """`seconds` as m:ss or h:mm:ss, with tenths where they are not whole: 93.5 is 1:33.5."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def duration(seconds: float) -> str:
    """Whole seconds, minutes and hours: "9 s", "1:23", "2:03:04"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def seconds_of(text: str | float | None) -> float | None:
    """Seconds of h:mm:ss, m:ss or seconds, and of what somebody has typed of it so far; None of nothing.

    Raises:
        ValueError: it is no time.
    """
    text = str(text or "").strip()
    if not text:
        return None
    if not re.fullmatch(r"(\d+:){0,2}\d*(\.\d*)?", text):
        raise ValueError(f"{text!r} is no time: write minutes and seconds as 1:30, or seconds as 90.")
    total = 0.0
    for i, part in enumerate(text.split(":")):
        value = float(part) if part.strip(".") else 0.0
        if i and value >= 60:
            raise ValueError(f"{text!r} is no time: {value:g} after a colon; 59 is the most.")
        total = 60 * total + value
    return total
