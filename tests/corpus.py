"""Clips for tests, in every container and with every oddity that users bring, whose frames say which they are.

A frame carries its number in binary, as eight black or white blocks from left to right, highest bit first, and beneath
them the same eight inverted; so it can be read at any size and after any codec, and only if it is upright.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from videonsa.video_reader import VideoFile

BITS = 8
SIZE = WIDTH, HEIGHT = 128, 64
X264 = {"x264-params": "scenecut=0:bframes=2:b-adapt=0:keyint=12:min-keyint=12", "preset": "veryfast"}
X265 = {"x265-params": "log-level=none:scenecut=0:bframes=3:keyint=12:min-keyint=12:pools=none", "preset": "ultrafast"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "12"}

# File name: arguments of `write`. Of 60 frames, every twelfth is a key frame where the codec has others.
CORPUS = {
    "h264.mp4": {},
    "h264.mov": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.flv": {},
    "h264.h264": {},
    "h264.avi": {},
    "h264.vob": {},
    "h264.asf": {},
    "faststart.mp4": {"container": {"movflags": "faststart"}},
    "fragmented.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "open-gop.mp4": {"options": {**X264, "x264-params": X264["x264-params"] + ":open-gop=1"}},
    "open-gop.ts": {"options": {**X264, "x264-params": X264["x264-params"] + ":open-gop=1"}},
    "intra-refresh.mkv": {"options": {"x264-params": "scenecut=0:intra-refresh=1:keyint=12:bframes=0"}},
    "one-key-frame.mp4": {"options": {"x264-params": "scenecut=0:keyint=infinite:bframes=2"}},
    "interlaced.ts": {"options": {"x264-params": "tff=1:keyint=12"}},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc-open-gop.mkv": {"codec": "libx265", "options": {**X265, "x265-params": X265["x265-params"] + ":open-gop=1"}},
    "hevc-layers.mp4": {
        "codec": "libx265",
        "options": {**X265, "x265-params": X265["x265-params"] + ":temporal-layers=1:b-pyramid=1"},
    },
    "hevc-10-bit.mp4": {"codec": "libx265", "options": X265, "pix_fmt": "yuv420p10le"},
    "vp8.webm": {"codec": "libvpx", "options": VPX},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VPX},
    "vp9-alt-ref.mkv": {"codec": "libvpx-vp9", "options": {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "12"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "8", "crf": "10", "g": "12", "svtav1-params": "lp=1"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}, "fps": 25},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "prores-10-bit.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "yuv444p"},
    "alpha.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "palette.gif": {"codec": "gif", "pix_fmt": "bgr8", "fps": 10},
    "animated.png": {"codec": "apng", "pix_fmt": "rgb24", "format": "apng"},
    "variable.mp4": {"times": "variable"},
    "variable.mkv": {"times": "variable"},
    "variable.webm": {"times": "variable", "codec": "libvpx-vp9", "options": VPX},
    "late.mp4": {"times": "late"},
    "late.mkv": {"times": "late"},
    "late.ts": {"times": "late"},
}
FRAMES = 60


def times_of(name: str) -> list[float]:
    """Seconds from its first frame at which the frames of a clip of the corpus begin."""
    spec = CORPUS[name]
    if spec.get("times") == "variable":  # slow, then fast, then with gaps
        return [*(i * 0.2 for i in range(20)), *(4 + i * 0.05 for i in range(20)), *(5 + i * 0.5 for i in range(20))]
    return [i / spec.get("fps", 8) for i in range(FRAMES)]


def picture(number: int, width: int = SIZE[0], height: int = SIZE[1]) -> np.ndarray:
    """uint8 [height, width, 3]."""
    bits = np.array([number >> (BITS - 1 - i) & 1 for i in range(BITS)], np.uint8) * 255
    columns = bits[np.arange(width) * BITS // width]
    rows = np.where(np.arange(height)[:, None] < height // 2, columns, 255 - columns)
    return np.repeat(rows[:, :, None], 3, 2)


def number_of(frame: np.ndarray) -> int:
    """What a frame [3, height, width] of 0 to 255 says; -1 if it says nothing."""
    _, height, width = frame.shape
    edges = np.linspace(0, width, BITS + 1).round().astype(int)
    cells = np.array(
        [
            [
                frame[:, half * height // 2 : (half + 1) * height // 2, a:b].mean()
                for a, b in zip(edges, edges[1:], strict=False)
            ]
            for half in (0, 1)
        ]
    )
    bits = cells > 127
    if (bits[0] == bits[1]).any():
        return -1
    return int(sum(int(bit) << (BITS - 1 - i) for i, bit in enumerate(bits[0])))


def numbers_of(frames) -> list[int]:
    return [number_of(np.asarray(frame, np.float32)) for frame in frames]


def write(
    path,
    pictures,
    *,
    codec="libx264",
    fps=8,
    pix_fmt="yuv420p",
    options=None,
    container=None,
    times=None,
    format=None,
    prepare=lambda stream: None,
) -> Path:
    """Encode uint8 pictures [height, width, 3 or 4] at a constant rate, or at `times` in seconds; returns `path`.

    `prepare(stream)` may set what else there is to set, such as colours.
    """
    options = X264 if options is None and codec == "libx264" else options or {}
    with av.open(str(path), "w", format=format, options=container or {}) as output:
        stream = None
        for i, image in enumerate(pictures):
            if stream is None:
                stream = output.add_stream(codec, rate=fps, options=options)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = pix_fmt
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
                prepare(stream)
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            if frame.format.name != pix_fmt:
                frame = frame.reformat(format=pix_fmt)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return Path(path)


def make(folder: Path, name: str) -> Path:
    """The clip of that name of the corpus."""
    spec = dict(CORPUS[name])
    if kind := spec.pop("times", None):
        spec["times"] = [time + (1.6 if kind == "late" else 0) for time in times_of(name)]
    return write(folder / name, (picture(i) for i in range(FRAMES)), **spec)


def read(source, indices=None, height=HEIGHT, width=WIDTH, **kwargs) -> torch.Tensor:
    """Frames of a file, uint8 [frames, 3, height, width]; all of them unless there are indices."""
    with VideoFile(source, **kwargs) as file:
        return file.read(range(len(file)) if indices is None else indices, height, width)
