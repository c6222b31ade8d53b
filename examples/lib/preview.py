"""What a browser can play of a video file: the file itself, or a small copy of it."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from videonsa.video_reader import VideoFile

# What current versions of Chrome, Firefox and Safari all play. 10 bits or more colour than 4:2:0, some do not.
CODECS = {"mov,mp4,m4a,3gp,3g2,mj2": {"h264", "vp9", "av1"}, "matroska,webm": {"vp8", "vp9", "av1"}}
PIXELS = {"yuv420p", "yuvj420p"}
HEIGHT, RATE, FRAMES = 360, 12, 7200  # at most, of a copy: pixels, frames per second, frames
PART = 48  # frames that are read at once


def is_playable(path: str | Path) -> bool:
    """Whether browsers play a file.

    Matroska counts only as WebM, and by its name, from which servers tell browsers the type.
    """
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        kind = container.format.name
        named = "webm" not in kind or Path(path).suffix.lower() == ".webm"
        return named and context.codec.canonical_name in CODECS.get(kind, ()) and context.pix_fmt in PIXELS


def convert(path: str | Path, output: str | Path, max_seconds: float = 24 * 3600) -> Iterator[float]:
    """Write a small silent copy, H.264 in MP4, of the same times; yields which share of it is done.

    Raises:
        OSError, ValueError: as `VideoFile`.
    """
    with VideoFile(str(path), max_seconds=max_seconds, on_error="keep") as file:
        count = max(min(round(file.duration * RATE), len(file), FRAMES), 1)
        indices = np.unique(np.searchsorted(file.times, np.linspace(0, file.times[-1], count)))
        height = min(file.height, HEIGHT)
        height, width = (max(round(x / 2) * 2, 2) for x in (height, file.width * height / file.height))
        with av.open(str(output), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "26"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            # A key frame every two seconds: a click on a moment is to show it at once.
            stream.codec_context.gop_size = 2 * RATE
            for start in range(0, len(indices), PART):
                part = indices[start : start + PART].tolist()
                for i, pixels in zip(part, file.read(part, height, width), strict=True):
                    frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
                    frame.pts, frame.time_base = round(file.times[i] * 1000), Fraction(1, 1000)
                    container.mux(stream.encode(frame))
                yield min((start + PART) / len(indices), 1.0)
            container.mux(stream.encode())
