"""Reads chosen frames of a video file, each resized as it is decoded.

A file is read twice. Its packets, not decoded, give the time of every frame and where decoding can start; then what the
chosen frames depend on is decoded, in several threads that each start at key frames of their own, and no other frame is
converted or held. Which frames to choose, and how large, is decided in `video_planner.py` and `processing_videonsa.py`;
`video_source.py` opens paths and URLs.
"""

import contextlib
import gc
import math
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import av
import numpy as np
import torch
import torchvision.transforms.v2.functional as tvF
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from transformers.utils import logging

from .video_planner import ROUNDING
from .video_source import open_source, refers_to_others

logger = logging.get_logger(__name__)

# Packets. Leaving out fewer saves nothing: the decoder is emptied and starts anew.
MIN_JUMP = 16
# Codecs whose decoders know the frames that no other refers to. (What HEVC's takes for such may still be needed.)
SKIP_UNREFERENCED = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
# Demuxers that draw text, or that open other files and sockets.
NO_VIDEOS = {"tty", "concat", "hls", "dash", "sdp"}
# Packets. Less work for one of several decoders does not make up for opening the file once more, nor for starting anew.
MIN_WORK = 128
# Bytes that frames may take: those in flight between the threads of a decoder, and those that all decoders refer to.
THREAD_MEMORY, DECODER_MEMORY = 48 * 2**20, 128 * 2**20
LIMITED_RANGE, FULL_RANGE = 1, 2  # of luma and chroma, as libav numbers them
ANY_MATRIX = 4  # for RGB it means nothing, but PyAV 16 looks at the range only where matrices differ; none has this
# Decoders that are closed but not yet collected have threads that a forked process lacks, and would wait for.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gc.collect)


class VideoFile:
    """The video stream of a file: times read from its packets, frames decoded on demand. To be used in a `with`.

    Attributes:
        name: what errors call the file.
        times: float64 [frames], seconds from the first frame, ascending.
        duration: seconds, until the last frame leaves the screen.
        width, height: of a frame as it is shown, upright and with square pixels.

    Args:
        source: path, URL, bytes or binary file object. What http(s) sends, or what cannot be read twice, is first
            copied to a temporary file.
        on_error: "raise", or "keep" to make do with what can be decoded: the frame before stands in for a damaged one.
        max_pixels, max_seconds: what a frame and a file may come to, against decompression bombs.
        timeout: seconds that a server may take to answer or to go on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a video, ends early (unless `on_error="keep"`) or exceeds a limit.
    """

    def __init__(self, source, *, on_error="raise", max_pixels=2**26, max_seconds=24 * 3600, timeout=30.0):
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error must be 'raise' or 'keep', got {on_error!r}")
        self.keep = on_error == "keep"
        self.max_pixels, self.max_seconds, self.timeout = max_pixels, max_seconds, timeout
        self.name, self.source, self.temporary = open_source(source, timeout, self.keep)
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.times)

    def close(self) -> None:
        if self.temporary:
            self.source.close()

    def read(self, indices: list[int], height: int, width: int, resize: Callable | None = None) -> torch.Tensor:
        """The frames at `indices`, which ascend and may repeat: uint8 [len(indices), 3, height, width].

        `resize(frame, height, width)` takes a frame uint8 [1, 3, H, W]; by default it is bicubic with antialiasing.

        Raises:
            ValueError: a frame cannot be decoded (unless `on_error="keep"`).
        """
        return self.read_parts(indices, height, width, max(len(indices), 1), resize)[0]

    def read_parts(self, indices, height: int, width: int, size: int, resize=None) -> list[torch.Tensor]:
        """The same as tensors of `size` frames, the last of what is left, which can be given up one after the other."""
        resize, lock = resize or resize_bicubic, threading.Lock()
        slots = {}  # where each frame goes
        for slot, i in enumerate(indices):
            slots.setdefault(i, []).append(slot)
        sizes = [min(size, len(indices) - start) for start in range(0, max(len(indices), 1), size)]
        parts, name = [np.empty((n, 3, height, width), np.uint8) for n in sizes], os.path.basename(self.name)

        def fill(i: int, frame: np.ndarray) -> None:
            for slot in slots[i]:
                parts[slot // size][slot % size] = frame

        with logging.tqdm(total=len(slots), desc=name, unit="frame", delay=3, leave=False) as bar:

            def store(i: int, pixels: np.ndarray) -> None:
                # Copies are numpy's: those of torch take threads, which go on waiting where decoding needs the cores.
                fill(i, resize(torch.from_numpy(pixels).permute(2, 0, 1)[None], height, width).numpy()[0])
                with lock:
                    bar.update()

            missing = self._decode(sorted(slots), store)
        if missing:
            decoded = sorted(slots.keys() - missing)
            if not decoded:
                raise ValueError(f"{self.name}: none of its frames can be decoded")
            logger.warning(f"{self.name}: {len(missing)} of {len(slots)} frames are damaged; those before stand in")
            for i in missing:
                slot = slots[max((j for j in decoded if j < i), default=decoded[0])][0]
                fill(i, parts[slot // size][slot % size])
        return [torch.from_numpy(part) for part in parts]

    def _scan(self) -> None:
        """Read all packets; decode the first frame, which tells how frames are to be shown."""
        pts, dts, durations, flags = array("q"), array("q"), array("q"), array("b")
        first, broken, damaged, end = None, None, None, 0.0
        with self._open() as (container, stream):
            self._check_size(stream.codec_context, "in its header")
            self.tick, rate = float(stream.time_base), float(stream.guessed_rate or stream.average_rate or 24)
            # Without presentation times, packets are timed as they are stored, which is not as they are shown.
            kind = container.format.name
            self.in_order = kind == "avi" or (kind == "asf" and stream.codec_context.name == "h264")
            declared = (container.duration or 0) / av.time_base
            self._check_duration(declared)
            try:
                for packet in container.demux():
                    if packet.pts is not None:
                        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    if packet.stream.index != stream.index:
                        continue
                    if packet.is_corrupt and damaged is None:
                        damaged = end
                    first = first or first_frame(packet)
                    if packet.size:
                        known = packet.pts is not None
                        pts.append(packet.pts if known else 0)
                        timed = packet.dts is not None
                        dts.append(packet.dts if timed else pts[-1])
                        durations.append(packet.duration or 0)
                        flags.append(known + 2 * packet.is_keyframe + 4 * packet.is_discard + 8 * timed)
            except av.FFmpegError as error:
                broken = error
            shape = first or stream.codec_context
            self._check_size(shape, "in its first frame")
            aspect = stream.sample_aspect_ratio or 1
        self._set_times(*map(np.asarray, (pts, dts, durations, flags)), rate)
        # Streams may end a little before their container does.
        if not self.keep and (broken or end + 1 < declared):
            raise ValueError(
                f"{self.name}: truncated after {end:.1f} of {declared:.1f} s ({len(self)} frames)"
                f"{f': {broken}' if broken else ''}; on_error='keep' makes do with those"
            )
        if damaged is not None and not self.keep:
            raise ValueError(f"{self.name}: damaged after {damaged:.1f} s; on_error='keep' makes do with the rest")
        self._check_duration(self.duration)
        self.quarter_turns = round(first.rotation / 90) if first else 0  # counterclockwise; phones film sideways
        self.pixels = max(shape.width * shape.height, 1)
        shown = max(round(shape.width * aspect), 1), shape.height
        self.width, self.height = shown[::-1] if self.quarter_turns % 2 else shown

    def _set_times(self, pts, dts, durations, flags, rate: float) -> None:
        """Of packets in the order of the file, int64 [packets] each, to the times of frames in the order shown."""
        timed = np.flatnonzero(flags & 8)
        anew = timed[1:][np.diff(dts[timed]) * self.tick < -1]
        if len(anew):
            if not self.keep:
                raise ValueError(
                    f"{self.name}: its clock starts anew after {anew[0]} of {len(pts)} frames, as where files "
                    "were strung together: remux it; on_error='keep' makes do with those"
                )
            pts, dts, durations, flags = (values[: anew[0]] for values in (pts, dts, durations, flags))
            flags &= ~2  # no jumps to key frames: one of the same time may follow
        known, key, discard = (flags & bit > 0 for bit in (1, 2, 4))
        key &= known
        if 2 * known.sum() < len(known):  # a raw stream, not in a container; or H.264 in an MPEG programme stream
            pts, durations, known = np.arange(len(pts)), np.ones(len(pts)), known | True
            self.tick, self.in_order = 1 / rate, True
        elif key.any():  # a recording may start anywhere, but what is shown before its first key frame is lost
            known &= pts >= pts[key][0]
        positions = np.flatnonzero(known & ~discard)
        if not len(positions):
            raise ValueError(f"{self.name}: no frames in its video stream")
        positions = positions[np.argsort(pts[positions], kind="stable")]
        if not self.in_order:  # two packets of one time are two fields of one frame
            positions = positions[np.diff(pts[positions], prepend=pts[positions[0]] - 1) > 0]
        self.positions, self.pts, self.dts, self.key = positions, pts, dts, key

        times, count = (pts[positions] - pts[positions[0]]) * self.tick, len(positions)
        last = durations[positions[-1]] * self.tick or (np.median(np.diff(times)) if count > 1 else 1 / rate)
        duration = float(times[-1] + last)
        self.duration = count / rate if abs(duration - count / rate) < ROUNDING else duration
        constant = np.arange(count) * (self.duration / count)
        self.times = constant if np.abs(times - constant).max() < ROUNDING else times  # rid of the container's rounding

    def _decode(self, wanted: list[int], store: Callable[[int, np.ndarray], None]) -> set[int]:
        """Call `store(index, pixels)`, pixels uint8 [height, width, 3], for the frames wanted: in any order and from
        several threads. Returns those that cannot be decoded, of which there are none unless `on_error="keep"`."""
        todo = {int(self.pts[self.positions[i]]): i for i in wanted}

        def work(stretches: Iterable[tuple[int, int]], threads: int, skip=True, damaged=False):
            """Decode the stretches, which other threads may take from, too. Returns what there is to complain about."""
            reformatter = VideoReformatter()
            with contextlib.closing(self._frames(stretches, todo, threads, skip)) as frames:
                try:
                    for pts, frame in frames:
                        if frame.is_corrupt and not damaged:
                            return "a packet is damaged"
                        if (i := todo.pop(pts, None)) is not None:
                            store(i, self._pixels(frame, reformatter))
                except av.FFmpegError as error:
                    return error
            return "the stream ends"

        if not self.in_order:
            stretches, decoders, threads = self._divide(self.positions[wanted])
            if decoders == 1:
                work(stretches, threads)
            else:
                stretches = iter(stretches)
                with ThreadPoolExecutor(decoders) as pool:
                    try:
                        for done in as_completed([pool.submit(work, stretches, threads) for _ in range(decoders)]):
                            done.result()
                    except BaseException:
                        todo.clear()  # nothing is left to do for the others
                        raise
        if todo:
            # What a container calls a key frame may not be one: then frames come out damaged, or not at all.
            problem = work([(0, len(self.pts) - 1)], self._threads(), skip=False, damaged=self.keep)
        if todo and not self.keep:
            raise ValueError(
                f"{self.name}: truncated or damaged, {len(wanted) - len(todo)} of {len(wanted)} frames could be "
                f"decoded: {problem}; on_error='keep' makes do with those"
            )
        return set(todo.values())

    def _divide(self, positions: np.ndarray) -> tuple[list[tuple[int, int]], int, int]:
        """Stretches of the file to decode for the frames at `positions`, how many decoders do so side by side, and the
        threads of each."""
        threads = self._threads()
        stretches = self._stretches(positions, MIN_WORK)
        lengths = [last - first + 1 for first, last in stretches]
        decoders = min(threads, DECODER_MEMORY // (28 * self.pixels), sum(lengths) // max([*lengths, MIN_WORK]))
        if decoders < 2 or not isinstance(self.source, str) or "://" in self.source:  # what cannot be opened twice
            return self._stretches(positions), 1, threads
        return stretches, decoders, threads // decoders

    def _threads(self) -> int:
        return max(min(torch.get_num_threads(), THREAD_MEMORY // (3 * self.pixels)), 1)

    def _stretches(self, positions: np.ndarray, length: float = math.inf) -> list[tuple[int, int]]:
        """First and last position in the file of the packets to decode for the frames at `positions`; a stretch of at
        least that length does not go on over further key frames."""
        keys, ends = np.flatnonzero(self.key), {}  # the last position to decode from each key frame
        for position in sorted(positions.tolist()):
            # What is stored after a key frame, but shown before it, may depend on frames before the key frame.
            k = int(np.searchsorted(keys, position, side="right")) - 1
            while k > 0 and self.pts[keys[k]] > self.pts[position]:
                k -= 1
            ends[int(keys[k]) if k >= 0 else 0] = position
        stretches = []
        for start, end in sorted(ends.items()):
            first, last = stretches[-1] if stretches else (-math.inf, -math.inf)
            if start <= last + MIN_JUMP and start < first + length:
                stretches[-1] = first, max(last, end)
            else:
                stretches.append((start, end))
        return stretches

    def _frames(self, stretches, wanted: dict[int, int], threads: int, skip: bool):
        """Decode stretches of the file; yield (pts, frame) of the frames whose pts are wanted, until none is.

        With `skip`, what no wanted frame depends on is left out within a stretch, too: frames that no other refers to,
        and those before a key frame that the stretch starts at, which could not be decoded.
        """
        with self._open(threads) as (container, stream):
            context, count = stream.codec_context, 0
            intra = skip and context.codec.intra_only
            unreferenced = skip and context.name in SKIP_UNREFERENCED

            def decode(packet) -> Iterator[tuple[int, av.VideoFrame]]:
                nonlocal count
                try:
                    frames = context.decode(packet)
                except av.FFmpegError:
                    if not self.keep:
                        raise
                    frames, count = [], count + 1
                for frame in frames:
                    pts = int(self.pts[self.positions[count]]) if self.in_order and count < len(self) else frame.pts
                    count += 1
                    if pts in wanted:
                        yield pts, frame

            position, packets = 0, self._packets(container, stream)  # position: of the packet to come
            for first, last in stretches:
                if not position <= first <= position + MIN_JUMP:
                    container.seek(int(self.dts[first]), stream=stream)
                    packets = self._packets(container, stream)
                    packet = next((p for p in packets if p.pts == self.pts[first] and p.is_keyframe), None)
                    if packet is None:
                        return
                    position = first
                else:
                    context.flush_buffers()
                    packet = next(packets, None)
                start = self.pts[first] if skip and self.key[first] else -math.inf
                while packet is not None:
                    if not wanted:
                        return
                    needed = packet.pts in wanted
                    if unreferenced:
                        context.skip_frame = "DEFAULT" if needed else "NONREF"
                    early = skip and packet.pts is not None and packet.pts < start
                    if position >= first and (needed or not intra) and not early:
                        yield from decode(packet)
                    position += 1
                    packet = next(packets, None) if position <= last else None
                yield from decode(None)

    def _pixels(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        """uint8 [height, width, 3], upright."""
        try:
            return np.ascontiguousarray(np.rot90(to_rgb(frame, reformatter), self.quarter_turns))
        except (av.FFmpegError, OSError) as error:
            colours = f"{frame.format.name} with matrix {frame.colorspace:d}"
            raise ValueError(f"{self.name}: its colours, {colours}, cannot be converted: {error}") from error

    def _packets(self, container, stream) -> Iterator[av.Packet]:
        try:
            yield from (packet for packet in container.demux(stream) if packet.size)
        except av.FFmpegError:
            if not self.keep:
                raise

    @contextlib.contextmanager
    def _open(self, threads: int = 1) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        """Open the file and choose its video stream."""
        source = self.source
        remote = isinstance(source, str) and "://" in source
        try:
            if not remote and refers_to_others(source):
                raise ValueError(f"{self.name}: a list or description of other files or streams, no video file")
            if not isinstance(source, str):
                source.seek(0)
            elif not remote:
                source = f"file:{source}"  # a colon in a path is no protocol
            container = av.open(source, metadata_errors="replace", timeout=self.timeout if remote else None)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"{self.name}: cannot be read as a video: {error}") from error
        with container:
            if not NO_VIDEOS.isdisjoint(container.format.name.split(",")):
                raise ValueError(f"{self.name}: no video file, but {container.format.long_name}")
            # The cover of a song is a video stream too, of one picture.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams} - {"video"})
                raise ValueError(f"{self.name}: no video stream, only {', '.join(kinds) or 'pictures'}")
            context = streams[0].codec_context
            if context is None:
                raise ValueError(f"{self.name}: no decoder for its video stream")
            context.options = {"max_pixels": str(self.max_pixels)} | ({} if self.keep else {"err_detect": "explode"})
            context.thread_count, context.thread_type = threads, "AUTO"
            yield container, streams[0]

    def _check_size(self, shape, where: str) -> None:
        if shape.width * shape.height > self.max_pixels:
            raise ValueError(
                f"{self.name}: {shape.width} × {shape.height} pixels {where}, the limit is {self.max_pixels:,}"
            )

    def _check_duration(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise ValueError(f"{self.name}: {seconds:,.0f} seconds long, the limit is {self.max_seconds:,}")


def frames_on_screen(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Indices of the frames on screen at the moments: `times` are those of all frames; seconds, both ascending."""
    late = 1e-8  # against the rounding of floats
    return np.searchsorted(times, moments + late, side="right").clip(1) - 1


def first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.FFmpegError:
        return None  # reading the frames will tell


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """uint8 [height, width, 3], by the matrix and range that the file states; what is transparent becomes white."""
    alpha = any(component.is_alpha for component in frame.format.components)
    full = frame.format.is_rgb or frame.format.name.startswith("yuvj") or frame.color_range == FULL_RANGE
    rgb = reformatter.reformat(
        frame,
        format="rgba" if alpha else "rgb24",
        src_colorspace=frame.colorspace,
        dst_colorspace=ANY_MATRIX,
        src_color_range=FULL_RANGE if full else LIMITED_RANGE,
        dst_color_range=FULL_RANGE,
    )
    plane, channels = rgb.planes[0], 4 if alpha else 3
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    pixels = rows[:, : channels * plane.width].reshape(plane.height, plane.width, channels)
    if alpha:
        opacity = pixels[..., 3:] / np.float32(255)
        pixels = (pixels[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)
    return pixels


def resize_bicubic(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tvF.resize(frame, [height, width], interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
