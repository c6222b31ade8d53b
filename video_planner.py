"""Decides how many frames of a video a model gets to see, and how large they are.

Both take from the same budget of tokens. This file is plain arithmetic and reads no video; `processing_videonsa.py`
carries a plan out.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

PREFERENCES = ("pixels", "frames", "balanced")
# A request may have one of each pair.
RIVALS = (("fps", "num_frames"), ("max_pixels", "frame_tokens"))
# Settings that are positive integers.
COUNTS = (
    "num_frames",
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "frame_tokens",
    "block_size",
    "max_tokens",
)
# Seconds that a duration may lack: Matroska and FLV keep times in milliseconds.
ROUNDING = 2e-3


def shorten(text, limit: int = 200) -> str:
    """A text to quote in an error, without the middle if it is long."""
    text = str(text)
    if len(text) <= limit:
        return text
    return f"{text[: limit * 3 // 4]} … {text[-limit // 5 :]}"


@dataclass(frozen=True)
class VideoPlan:
    """What to take of a video: the frames on screen at `times`, evenly spaced from start to end.

    Attributes:
        num_frames, height, width: frames, and the pixels to which each is resized.
        start, end: seconds from the first frame.
        frame_tokens: vision tokens of a temporal patch, which is `temporal_patch_size` frames.
        budget: tokens that the plan may spend.
        stamp_tokens: the most text tokens that stand beside a temporal patch to say when it is shown.
    """

    num_frames: int
    height: int
    width: int
    start: float
    end: float
    frame_tokens: int
    budget: int
    temporal_patch_size: int = 2
    stamp_tokens: int = 0

    @property
    def patches(self) -> int:
        """Temporal patches of the video."""
        return math.ceil(self.num_frames / self.temporal_patch_size)

    @property
    def tokens(self) -> int:
        """Vision tokens of the video."""
        return self.patches * self.frame_tokens

    @property
    def prompt_tokens(self) -> int:
        """The most tokens that the video takes in a prompt: `tokens`, and those that say when they are shown."""
        return self.patches * (self.frame_tokens + self.stamp_tokens)

    @property
    def fps(self) -> float:
        return self.num_frames / (self.end - self.start)

    @property
    def times(self) -> np.ndarray:
        """float64 [num_frames], seconds from the first frame of the video."""
        return self.start + np.arange(self.num_frames) * ((self.end - self.start) / self.num_frames)

    def __str__(self) -> str:
        stamps = f" and up to {self.stamp_tokens} for their time" if self.stamp_tokens else ""
        return (
            f"{self.num_frames:,} frames of {self.width} × {self.height}, {self.fps:.3g} per second from "
            f"{self.start:.1f} to {self.end:.1f} s; {self.frame_tokens} tokens per {self.temporal_patch_size} frames"
            f"{stamps}, {self.prompt_tokens:,} of {self.budget:,} in all"
        )


def plan_video(
    duration: float,
    width: int,
    height: int,
    *,
    max_tokens: int = 128 * 1024,
    text_tokens: int = 1024,
    prefer: str = "pixels",
    fps: float | None = None,
    num_frames: int | None = None,
    max_pixels: int | None = None,
    frame_tokens: int | None = None,
    block_size: int | None = None,
    start: float | None = None,
    end: float | None = None,
    total_frames: int | None = None,
    every_frame: bool = False,
    do_resize: bool = True,
    default_fps: float = 4.0,
    min_pixels: int = 28 * 28,
    default_pixels: int = 224 * 224,
    min_frames: int = 2,
    max_frames: int | None = None,
    temporal_patch_size: int = 2,
    factor: int = 28,
    stamp_tokens: int = 0,
) -> VideoPlan:
    """Plan a video of `duration` seconds and `width` × `height` pixels within `max_tokens`.

    If the budget allows, there are `default_fps` frames per second, of the size that Qwen2.5-VL makes of a frame for
    `default_pixels`. Otherwise there are n temporal patches of t tokens each, with n·t within the budget. t is one of
    the sizes that Qwen2.5-VL makes of a frame for `min_pixels` to `default_pixels`.
    - `prefer="pixels"` takes the largest t such that one patch fits, then the most patches.
    - `prefer="frames"` takes the most patches that fit at the smallest t, then the largest t.
    - `prefer="balanced"` reduces both alike: it takes the largest minimum of n / n_max and t / t_max, then the largest
      n·t, then the largest t.

    Args:
        max_tokens, text_tokens: tokens of the prompt, and the part of them reserved for text.
        fps or num_frames: exact rate or number, rounded to whole temporal patches and limited to what the video has;
            then only the size of frames gives way to the budget.
        max_pixels or frame_tokens: exact size: what Qwen2.5-VL makes of a frame for `max_pixels`, or the largest size
            of at most `frame_tokens` tokens per temporal patch; then only the number of frames gives way.
        block_size: take only sizes whose tokens per temporal patch are a multiple of it; frames may be stretched.
        start, end: seconds, the part of the video to plan for.
        total_frames: frames of that part; no more are taken.
        every_frame: take all `total_frames`, and ignore `fps` and `num_frames`.
        do_resize: False leaves frames as they are.
        min_frames, max_frames: bounds for the number of frames that a rate gives.
        min_pixels: the least pixels of a frame.
        factor: the sides of a frame are multiples of it, and factor² pixels are a token.
        stamp_tokens: text tokens that each temporal patch takes from the budget besides.

    Raises:
        ValueError: an argument is out of range, two contradict each other, or the budget cannot hold what is asked for.
    """
    check_request(locals())
    start, end = check_range(start, end, duration)
    budget = int(max_tokens - text_tokens)

    counted = every_frame or fps is not None or num_frames is not None
    frames = total_frames
    if not every_frame:
        bounds = min_frames, max_frames, total_frames
        frames = count_frames(end - start, float(fps or default_fps), num_frames, *bounds, temporal_patch_size)
    patches = math.ceil(frames / temporal_patch_size)

    if do_resize:
        sizes = wanted_sizes(width, height, max_pixels, frame_tokens, default_pixels, min_pixels, factor, block_size)
    elif width % factor or height % factor:
        raise ValueError(f"do_resize=False needs sides that are multiples of {factor}, got {width} × {height}")
    else:
        sizes = [(width * height // factor**2, (height, width))]

    fitting = [(min(patches, budget // (tokens + stamp_tokens)), tokens, size) for tokens, size in sizes]
    options = [option for option in fitting if option[0] == patches or (option[0] > 0 and not counted)]
    if not options:
        tokens, (h, w) = sizes[0]
        n, asked = (patches, "") if counted else (1, "even ")
        needed = n * (tokens + stamp_tokens)
        raise ValueError(
            f"max_tokens={max_tokens:,} less text_tokens={text_tokens:,} leaves {budget:,} for the video, but {asked}"
            f"{min(n * temporal_patch_size, frames):,} frames of {w} × {h} are {needed:,} tokens: "
            f"max_tokens must be at least {text_tokens + needed:,}, or text_tokens smaller"
        )

    n, tokens, (h, w) = best_option(options, prefer, patches, max(tokens for tokens, _ in sizes))
    if n < patches:
        frames = n * temporal_patch_size
    return VideoPlan(frames, h, w, start, end, tokens, budget, temporal_patch_size, stamp_tokens)


def best_option(options: list[tuple], prefer: str, max_patches: int, max_tokens: int) -> tuple:
    """The option, (patches, tokens of each, size), that `plan_video` prefers."""
    key = {
        "pixels": lambda o: (o[1], o[0]),
        "frames": lambda o: (o[0], o[1]),
        "balanced": lambda o: (min(o[0] / max_patches, o[1] / max_tokens), o[0] * o[1], o[1]),
    }[prefer]
    return max(options, key=key)


def wanted_sizes(
    width: int,
    height: int,
    max_pixels: int | None,
    frame_tokens: int | None,
    default_pixels: int,
    min_pixels: int,
    factor: int,
    block_size: int | None,
) -> list[tuple[int, tuple[int, int]]]:
    """The sizes of `frame_sizes` that a request allows: one if it names `max_pixels` or `frame_tokens`."""
    limit = max_pixels or default_pixels
    if frame_tokens is not None:
        limit = frame_tokens * factor**2
    sizes = frame_sizes(width, height, min(min_pixels, limit), limit, factor, block_size)
    if frame_tokens is not None:
        sizes = [(tokens, size) for tokens, size in sizes if tokens <= frame_tokens]
        if not sizes:
            raise ValueError(f"frame_tokens={frame_tokens} cannot hold a frame of {width} × {height}")
    exact = max_pixels is not None or frame_tokens is not None
    return sizes[-1:] if exact else sizes


def count_frames(seconds, fps, num_frames, min_frames, max_frames, total, patch) -> int:
    """Frames that a request comes to before any budget: a multiple of `patch` unless the video has fewer."""
    if num_frames is not None:
        if total is not None and num_frames > total:
            raise ValueError(f"num_frames={num_frames} is more than the {total} frames of the video")
        count = max(round(num_frames / patch), 1) * patch
    else:
        count = max(int((seconds + ROUNDING) * fps), min_frames, patch)
        count = min(count, max_frames or count)

    if total is None:
        total = count
    return min(count, total) // patch * patch or total


def frame_sizes(
    width: int, height: int, min_pixels: int, max_pixels: int, factor: int, block_size: int | None = None
) -> list[tuple[int, tuple[int, int]]]:
    """(tokens, (height, width)) of the sizes to choose from, by tokens; the last is the one for `max_pixels`."""
    token = factor**2  # pixels
    if block_size is not None:
        sizes = block_sizes(width / height, block_size, min_pixels / token, max_pixels // token, width * height / token)
        if not sizes:
            raise ValueError(
                f"block_size={block_size} needs frames of {block_size * token:,} pixels, the most is {max_pixels:,}"
            )
        return [(rows * columns, (rows * factor, columns * factor)) for rows, columns in sizes]

    sizes = {}
    # More pixels than these do not make a frame any larger.
    rounded = round(width / factor) * round(height / factor) * token
    for pixels in [*range(min_pixels, min(max_pixels, rounded), token), max_pixels]:
        h, w = smart_resize(height, width, factor, min_pixels, pixels)
        sizes[h * w // token] = h, w
    return sorted(sizes.items())


def block_sizes(aspect: float, block: int, least: float, most: float, tokens: float) -> list[tuple[int, int]]:
    """Sizes of a frame that fill whole blocks, as (rows, columns) in tokens.

    For each multiple of `block` from `least` to `most`, the size that stretches the frame the least. The last multiple
    is the one that holds the `tokens` of the frame unless `most` ends before it.
    """
    holds_frame = math.ceil(max(tokens, least) / block) * block
    sizes = []
    for count in range(block, min(int(most), holds_frame) + 1, block):
        if count < least:
            continue
        pairs = [(rows, count // rows) for rows in range(1, math.isqrt(count) + 1) if count % rows == 0]
        pairs += [pair[::-1] for pair in pairs]
        sizes.append(min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0] / aspect))))
    return sizes


def check_range(start: float | None, end: float | None, duration: float) -> tuple[float, float]:
    """Start and end in seconds, within the video."""
    first = start or 0.0
    last = duration if end is None else min(end, duration)
    if not 0 <= first < last:
        raise ValueError(f"start={start} and end={end} leave nothing of a video of {duration:.3f} s")
    return float(first), float(last)


def check_request(request: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of `plan_video` that no video can meet; others are ignored."""
    given = defaultdict(lambda: None, request)
    for a, b in RIVALS:
        if given[a] is not None and given[b] is not None:
            got = f"{a}={shorten(given[a], 90)}, {b}={shorten(given[b], 90)}"
            raise ValueError(f"pass `{a}` or `{b}`, not both (got {got})")

    fps = given["fps"]
    if fps is not None and not (isinstance(fps, Real) and 0 < fps < math.inf):
        raise ValueError(f"fps must be a positive number, got {shorten(repr(fps))}")
    for name in ("start", "end"):
        if (value := given[name]) is not None and not isinstance(value, Real):
            raise ValueError(f"{name} must be a number of seconds, got {shorten(repr(value))}")
    for name in COUNTS:
        if (value := given[name]) is not None and not (isinstance(value, Integral) and value > 0):
            raise ValueError(f"{name} must be a positive integer, got {shorten(repr(value))}")
    if (value := given["text_tokens"]) is not None and not (isinstance(value, Integral) and value >= 0):
        raise ValueError(f"text_tokens must be an integer of at least 0, got {shorten(repr(value))}")

    max_frames = given["max_frames"]
    patch = given["temporal_patch_size"]
    if max_frames is not None and patch is not None and max_frames < patch:
        raise ValueError(f"max_frames={max_frames} cannot hold the {patch} frames of a temporal patch")
    prefer = given["prefer"]
    if prefer is not None and prefer not in PREFERENCES:
        raise ValueError(f"prefer must be one of {', '.join(PREFERENCES)}; got {shorten(repr(prefer))}")
