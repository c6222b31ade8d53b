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
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from transformers.utils import logging

from .video_planner import ROUNDING, shorten
from .video_source import asf_seconds, movie_edits, open_source, refers_to_others

logger = logging.get_logger(__name__)

# Packets. Leaving out fewer saves nothing: the decoder is emptied and starts anew.
MIN_JUMP = 16
# Codecs whose decoders know the frames that no other refers to. (What HEVC's takes for such may still be needed.)
SKIP_UNREFERENCED = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
# Demuxers that draw text, or that open other files and sockets.
NO_VIDEOS = {"tty", "concat", "hls", "dash", "sdp"}
# Demuxers whose containers state no length: libav makes one up from the last packets.
UNDECLARED = {"mpegts", "mpeg"}
# Frames that a list of edits may show.
MAX_FRAMES = 2**25
# Transfer curves, as libav numbers them: PQ and HLG.
HDR = (16, 18)
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
        source: path, URL (`data:` too), bytes, binary file object, or what `open_source` makes of them. What http(s)
            sends, or what cannot be read twice, is first copied to a temporary file.
        on_error: "raise", or "keep" to make do with what can be decoded: the frame before stands in for a damaged one.
        max_pixels, max_seconds: what a frame and a file may come to, against decompression bombs.
        timeout: seconds that a server may take to answer or to go on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a video, ends early (unless `on_error="keep"`) or exceeds a limit.
    """

    def __init__(self, source, *, on_error="raise", max_pixels=2**26, max_seconds=24 * 3600, timeout=30.0):
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error must be 'raise' or 'keep', got {shorten(repr(on_error))}")
        self.keep = on_error == "keep"
        self.max_pixels, self.max_seconds, self.timeout = max_pixels, max_seconds, timeout
        self.opened = open_source(source, timeout, self.keep)
        self.name, self.source = self.opened.name, self.opened.file
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
        self.opened.close()

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
            slots.setdefault(int(self.same[i]), []).append(slot)
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
        first, fed, broken, damaged = None, 0, None, None
        others = {}  # stream: its earliest and latest time, in its ticks
        self.options, self.stream, self.edits = {}, None, None
        with contextlib.ExitStack() as stack:
            container, stream = stack.enter_context(self._open())
            kind, self.stream = container.format.name, stream.index
            movie = "mov" in kind
            if movie and (edits := movie_edits(self.source, stream.id)):
                # libav gets only simple lists right. Without them, frames have the times that edits refer to.
                self.edits, self.options = edits, {"ignore_editlist": "1"}
                stack.close()
                container, stream = stack.enter_context(self._open())
            context = stream.codec_context
            self._check_size(context, "in its header")
            self.tick, rate = float(stream.time_base), float(stream.guessed_rate or stream.average_rate or 24)
            # Without presentation times, packets are timed as they are stored, which is not as they are shown.
            self.in_order = kind == "avi" or (kind == "asf" and context.name in ("h264", "hevc", "mpeg4"))
            self.matroska = "matroska" in kind
            declared = 0.0 if kind in UNDECLARED else (container.duration or 0) / av.time_base
            if kind == "asf":
                declared = declared or asf_seconds(self.source)
            self._check_duration(declared - max(container.start_time or 0, 0) / av.time_base)
            track = stream.start_time or 0, stream.duration or 0, stream.frames
            try:
                for packet in container.demux():
                    if packet.stream.index != stream.index:
                        if packet.pts is not None:
                            begin, end = others.get(packet.stream, (packet.pts, packet.pts))
                            end = max(end, packet.pts + (packet.duration or 0))
                            others[packet.stream] = min(begin, packet.pts), end
                        continue
                    if packet.is_corrupt and damaged is None:
                        damaged = len(pts)
                    if first is None:
                        first, fed = first_frame(packet), fed + 1
                    if packet.size:
                        known = packet.pts is not None
                        pts.append(packet.pts if known else 0)
                        timed = packet.dts is not None
                        dts.append(packet.dts if timed else pts[-1])
                        durations.append(packet.duration or 0)
                        flags.append(known + 2 * packet.is_keyframe + 4 * packet.is_discard + 8 * timed)
            except av.FFmpegError as error:
                # libav takes the end of such a file for damage.
                broken = error if kind != "mpjpeg" else None
            spans = [(begin * float(s.time_base), end * float(s.time_base)) for s, (begin, end) in others.items()]
            shape = first or context
            if not shape.width or not shape.height:
                raise ValueError(f"{self.name}: no frames in its video stream")
            self._check_size(shape, "in its first frame")
            aspect = stream.sample_aspect_ratio or 1
            if context.color_trc in HDR:
                logger.warning_once("HDR video is read without tone mapping: its colours are approximate")

        pts, dts, durations, flags = map(np.asarray, (pts, dts, durations, flags))
        known, timed = flags & 1 > 0, flags & 8 > 0
        if known.any():
            spans.append((pts[known].min() * self.tick, (pts + durations)[known].max() * self.tick))
        begin, end = min((b for b, _ in spans), default=0.0), max((e for _, e in spans), default=0.0)
        length, gone = end - begin, None
        if movie and timed.any():
            # Durations are from the decoding of one packet to that of the next; that of the last may be unknown (0).
            # They add up to those of frames, the last of which goes when the track is over.
            stored = np.ptp(dts[timed]) + (durations[timed][-1] or np.diff(dts[timed]).max(initial=0))
            length = max(length, stored * self.tick)
            start, duration, count = track
            if 0 < count <= len(pts) or (stored - duration) * self.tick >= -1:
                declared = min(declared, length)
                gone = start + duration if duration else None
        self._set_times(pts, dts, durations, flags, rate, delay=fed - 1, end=gone)

        # What a file declares is its length or, if its clock starts late, sometimes where it ends. Streams may end a
        # little before their container does.
        length = max(length, self.duration)
        short = length + 1 < declared and abs(end - declared) > 1
        if (broken or short) and not self.keep:
            raise ValueError(
                f"{self.name}: truncated after {length:.1f}{f' of {declared:.1f}' if declared else ''} s "
                f"({len(self)} frames){f': {reason(broken)}' if broken else ''}; on_error='keep' makes do with those"
            )
        if damaged is not None and not self.keep:
            seconds = np.ptp(pts[: damaged + 1]) * self.tick
            raise ValueError(f"{self.name}: damaged after {seconds:.1f} s; on_error='keep' makes do with the rest")
        self._check_duration(self.duration)
        self.quarter_turns, self.mirrored = orientation(first)
        self.pixels = max(shape.width * shape.height, 1)
        shown = max(round(shape.width * aspect), 1), shape.height
        self.width, self.height = shown[::-1] if self.quarter_turns % 2 else shown

    def _set_times(self, pts, dts, durations, flags, rate: float, delay: int, end: int | None) -> None:
        """Of packets in the order of the file, int64 [packets] each, to the times of frames in the order shown.

        `delay` is the number of packets that the decoder takes ahead; `end`, in ticks, is when the last frame goes.
        """
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
        untimed = np.flatnonzero(~known)
        if self.matroska and 0 < 2 * len(untimed) <= len(known):
            # libav knows no times before zero, so that these are the first frames, and only their order is known.
            step = int(np.median(durations[untimed])) or round(1 / rate / self.tick)
            pts[untimed] = pts[known].min() - step * np.arange(len(untimed), 0, -1)
            known, self.in_order = known | True, True
        key &= known
        if 2 * known.sum() < len(known):
            # A raw stream, not in a container; or H.264 in an MPEG programme stream.
            pts, durations, known = np.arange(len(pts)), np.ones(len(pts)), known | True
            self.tick, self.in_order, timed = 1 / rate, True, timed[:0]
        elif key.any():  # a recording may start anywhere, but what is shown before its first key frame is lost
            known &= pts >= pts[key][0]
        positions = np.flatnonzero(known & ~discard)
        if not len(positions):
            raise ValueError(f"{self.name}: no frames in its video stream")
        positions = positions[np.argsort(pts[positions], kind="stable")]
        if not self.in_order:  # two packets of one time are two fields of one frame
            positions = positions[np.diff(pts[positions], prepend=pts[positions[0]] - 1) > 0]
        # Frames that come in order are only counted; of some, libav makes up the same time.
        self.pts = np.arange(len(pts)) if self.in_order else pts
        self.positions, self.dts, self.key = positions, dts, key
        self.same = range(len(positions))

        ticks, count = pts[positions], len(positions)
        if self.in_order and len(timed) == len(known):
            # A frame is shown when the decoder gives it up: at the time of the packet that it has then got to.
            ticks = np.sort(dts[positions])
            delay = min(delay, count - 1)
            ticks = np.append(ticks[delay:], ticks[-1] + (ticks[-1] - ticks[-2:][0]) * np.arange(1, delay + 1))
        if end is None or end <= ticks[-1]:
            end = ticks[-1] + (durations[positions[-1]] or (np.median(np.diff(ticks)) if count > 1 else 1 / rate))
        times, duration = (ticks - ticks[0]) * self.tick, float((end - ticks[0]) * self.tick)
        if self.edits:
            times, duration = self._edit(ticks, end)
            count = len(times)
        self.duration = count / rate if abs(duration - count / rate) < ROUNDING else duration
        constant = np.arange(count) * (self.duration / count)
        self.times = constant if np.abs(times - constant).max() < ROUNDING else times  # rid of the container's rounding

    def _edit(self, ticks: np.ndarray, end: int) -> tuple[np.ndarray, float]:
        """Put the frames in the order of `self.edits`, where they may be missing or repeated. Returns their times, in
        seconds from the first, and the duration. `ticks` are the frames' own times, `end` is that of the last's end."""
        shown, times, now, last = [], [], 0.0, 0.0
        for edit in self.edits:
            if edit.start is not None:
                stop = end if edit.stop is None else edit.stop
                first, after = np.searchsorted(ticks, (edit.start, stop))
                if edit.rate == 0:
                    after = np.searchsorted(ticks, edit.start, side="right").clip(1)
                    first = after - 1
                if sum(map(len, shown)) + after - first > MAX_FRAMES:
                    raise ValueError(f"{self.name}: more than {MAX_FRAMES:,} frames by its edit list, the limit")
                shown.append(np.arange(first, after))
                times.append(now + (ticks[first:after] - edit.start) * self.tick / (edit.rate or math.inf))
                last = now + ((stop - edit.start) * self.tick if edit.seconds is None else edit.seconds)
            now = now + edit.seconds if edit.start is None else last
        shown, times = np.concatenate(shown), np.concatenate(times)
        if not len(shown):
            raise ValueError(f"{self.name}: no frames in its video stream, by its edit list")
        self.positions = self.positions[shown]
        _, first, same = np.unique(self.positions, return_index=True, return_inverse=True)
        self.same = first[same]
        return times - times[0], last - times[0]

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
            pixels = to_rgb(frame, reformatter)
            pixels = pixels[:, ::-1] if self.mirrored else pixels
            return np.ascontiguousarray(np.rot90(pixels, self.quarter_turns))
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
            timeout = self.timeout if remote else None
            container = av.open(source, options=self.options, metadata_errors="replace", timeout=timeout)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"{self.name}: cannot be read as a video: {reason(error)}") from error
        with container:
            if not NO_VIDEOS.isdisjoint(container.format.name.split(",")):
                raise ValueError(f"{self.name}: no video file, but {container.format.long_name}")
            # The cover of a song is a video stream too, of one picture.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams} - {"video"})
                raise ValueError(f"{self.name}: no video stream, only {', '.join(kinds) or 'pictures'}")
            if self.stream is None:
                # What libav takes for the best, by what is the default and how many frames there are.
                best = container.streams.best("video")
                stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
            else:
                stream = container.streams[self.stream]
            context = stream.codec_context
            if context is None:
                raise ValueError(f"{self.name}: no decoder for its video stream")
            context.options = {"max_pixels": str(self.max_pixels)} | ({} if self.keep else {"err_detect": "explode"})
            context.thread_count, context.thread_type = threads, "AUTO"
            yield container, stream

    def _check_size(self, shape, where: str) -> None:
        if shape.width * shape.height > self.max_pixels:
            raise ValueError(
                f"{self.name}: {shape.width} × {shape.height} pixels {where}, the limit is {self.max_pixels:,}"
            )

    def _check_duration(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            raise ValueError(f"{self.name}: {seconds:,.0f} seconds long, the limit is {self.max_seconds:,}")


def reason(error: Exception) -> str:
    """An error's text, without the name of the file, which libav puts at its end."""
    return shorten(getattr(error, "strerror", None) or error)


def frames_on_screen(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Indices of the frames on screen at the moments: `times` are those of all frames; seconds, both ascending."""
    late = 1e-8  # against the rounding of floats
    return np.searchsorted(times, moments + late, side="right").clip(1) - 1


def orientation(frame: av.VideoFrame | None) -> tuple[int, bool]:
    """(quarter turns counterclockwise, whether to mirror from left to right before) to show a frame upright, nearest to
    its display matrix. One that cannot be inverted says nothing."""
    try:
        side = frame and frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # PyAV knows no name for some other side data
        return (round(frame.rotation / 90) % 4 if abs(frame.rotation) <= 360 else 0), False
    if not side:
        return 0, False
    a, b, _, c, d = (int(x) for x in np.frombuffer(side, np.int32)[:5])
    mirrored = a * d < b * c
    if a * d == b * c:
        return 0, False
    if mirrored:
        a, b = -a, -b
    return -round(math.atan2(b - c, a + d) / (math.pi / 2)) % 4, mirrored


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
