"""Reads chosen frames of a video file, each resized as it is decoded.

A file is read twice. First its packets, without decoding: they give the time of every frame and the places where
decoding can start. Then the frames that the chosen ones depend on are decoded, by several threads that each start at
key frames of their own. No other frame is converted or held.

`video_planner.py` and `processing_videonsa.py` choose the frames and their size, and `video_source.py` opens files.
"""

import contextlib
import gc
import math
import os
import threading
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

from .video_packets import Packets, Scan, decoder_ticks, read_packets, without_rounding
from .video_planner import shorten
from .video_source import asf_seconds, movie_edits, open_source, refers_to_others

logger = logging.get_logger(__name__)

# The fewest packets to jump over: the decoder is emptied and starts anew, which takes about as long as decoding them.
MIN_JUMP = 16
# The fewest packets for one of several decoders: each opens the file once more.
MIN_WORK = 128
# Codecs whose decoders know the frames that no other frame refers to. HEVC is not one: its decoder also leaves out
# frames that are needed.
SKIP_UNREFERENCED = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
# Demuxers that draw text, or that open other files and sockets.
NO_VIDEOS = {"tty", "concat", "hls", "dash", "sdp"}
# Demuxers whose containers state no length: libav makes one up from the last packets.
UNDECLARED = {"mpegts", "mpeg"}
# Frames that a list of edits may show.
MAX_FRAMES = 2**25
# Bytes of the frames that the threads of one decoder work on.
THREAD_MEMORY = 48 * 2**20
# Bytes of the frames that all decoders keep to refer to.
DECODER_MEMORY = 128 * 2**20

# Numbers of libav: transfer curves PQ and HLG, ranges of luma and chroma, a matrix.
HDR = (16, 18)
LIMITED_RANGE = 1
FULL_RANGE = 2
# The matrix has no meaning for RGB. But PyAV 16 converts the range only if source and target have different matrices,
# and no source has this one.
ANY_MATRIX = 4

# A forked process has the objects of decoders, but not their threads. Collecting such an object would wait for its
# threads forever, so closed decoders are collected before each fork, once one had threads.
threads_were_used = threading.Event()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: threads_were_used.is_set() and gc.collect())


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
        max_pixels, max_seconds: upper limits on the size of a frame and on the duration. They guard against
            decompression bombs.
        timeout: seconds that a server may take to answer or to go on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a video, ends early (unless `on_error="keep"`) or exceeds a limit.
    """

    def __init__(self, source, *, on_error="raise", max_pixels=2**26, max_seconds=24 * 3600, timeout=30.0):
        if on_error not in ("raise", "keep"):
            raise ValueError(f"on_error must be 'raise' or 'keep', got {shorten(repr(on_error))}")
        self.keep = on_error == "keep"
        self.max_pixels = max_pixels
        self.max_seconds = max_seconds
        self.timeout = timeout
        self.opened = open_source(source, timeout, self.keep)
        self.name = self.opened.name
        self.source = self.opened.file
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
        """The same as a list of tensors, which can be freed one by one: `size` frames each, fewer in the last."""
        resize = resize or resize_bicubic
        lock = threading.Lock()
        slots = {}  # where each frame goes
        for slot, i in enumerate(indices):
            slots.setdefault(int(self.same[i]), []).append(slot)
        starts = range(0, max(len(indices), 1), size)
        parts = [np.empty((min(size, len(indices) - start), 3, height, width), np.uint8) for start in starts]

        def fill(i: int, frame: np.ndarray) -> None:
            for slot in slots[i]:
                parts[slot // size][slot % size] = frame

        name = os.path.basename(self.name)
        with logging.tqdm(total=len(slots), desc=name, unit="frame", delay=3, leave=False) as bar:

            def store(i: int, pixels: np.ndarray) -> None:
                # numpy copies, not torch: the threads that torch starts for a copy keep cores busy after it, which
                # the decoders need.
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
                before = max((j for j in decoded if j < i), default=decoded[0])
                slot = slots[before][0]
                fill(i, parts[slot // size][slot % size])
        return [torch.from_numpy(part) for part in parts]

    def _scan(self) -> None:
        """Read all packets; decode the first frame, which tells how frames are to be shown."""
        self.options = {}
        self.stream = None
        self.edits = None
        with contextlib.ExitStack() as stack:
            container, stream = stack.enter_context(self._open())
            kind = container.format.name
            self.stream = stream.index
            if "mov" in kind and (edits := movie_edits(self.source, stream.id)):
                # libav gets only simple lists right. Without them, frames have the times that edits refer to.
                self.edits = edits
                self.options = {"ignore_editlist": "1"}
                stack.close()
                container, stream = stack.enter_context(self._open())

            context = stream.codec_context
            self._check_size(context, "in its header")
            self.tick = float(stream.time_base)
            self.rate = float(stream.guessed_rate or stream.average_rate or 24)
            # Without presentation times, packets have the times at which they are decoded, in another order.
            self.in_order = kind == "avi" or (kind == "asf" and context.name in ("h264", "hevc", "mpeg4"))
            self.matroska = "matroska" in kind
            declared = self._declared_seconds(container)
            track = (stream.start_time or 0, stream.duration or 0, stream.frames) if "mov" in kind else None

            scan = read_packets(container, stream)
            shape = scan.first or context
            if not shape.width or not shape.height:
                raise ValueError(f"{self.name}: no frames in its video stream")
            self._check_size(shape, "in its first frame")
            self.pixels = shape.width * shape.height
            shown = max(round(shape.width * (stream.sample_aspect_ratio or 1)), 1), shape.height
            if context.color_trc in HDR:
                logger.warning_once("HDR video is read without tone mapping: its colours are approximate")

        self._set_length(scan, declared, track)
        self.quarter_turns, self.mirrored = orientation(scan.first)
        self.width, self.height = shown[::-1] if self.quarter_turns % 2 else shown

    def _declared_seconds(self, container) -> float:
        """The length that a container states, or the end of a clock that starts late; 0 if it states none."""
        kind = container.format.name
        declared = 0.0 if kind in UNDECLARED else (container.duration or 0) / av.time_base
        if kind == "asf":
            declared = declared or asf_seconds(self.source)
        self._check_duration(declared - max(container.start_time or 0, 0) / av.time_base)
        return declared

    def _set_length(self, scan: Scan, declared: float, track: tuple[int, int, int] | None) -> None:
        """Set `times` and `duration`, and check that the file is whole.

        Args:
            declared: seconds that the container states; see `_declared_seconds`.
            track: of MP4 and QuickTime, what the track states: its start and duration in ticks, and its frames.
        """
        packets = scan.packets
        pts, known, timed = packets.pts, packets.known, packets.timed
        spans = scan.spans
        if known.any():
            last = (pts + packets.durations)[known].max()
            spans = [*spans, (pts[known].min() * self.tick, last * self.tick)]
        begin = min((begin for begin, _ in spans), default=0.0)
        end = max((end for _, end in spans), default=0.0)
        length = end - begin

        gone = None  # ticks at which the last frame leaves the screen
        if track and timed.any():
            # Durations are from the decoding of one packet to that of the next; that of the last may be unknown (0).
            # They add up to those of frames. The last frame leaves the screen at the end of the track.
            dts = packets.dts[timed]
            stored = np.ptp(dts) + (packets.durations[timed][-1] or np.diff(dts).max(initial=0))
            length = max(length, stored * self.tick)
            start, duration, count = track
            if 0 < count <= len(pts) or (stored - duration) * self.tick >= -1:
                declared = min(declared, length)
                gone = start + duration if duration else None
        self._set_times(packets, delay=scan.fed - 1, end=gone)

        # What a file declares is its length or, if its clock starts late, sometimes where it ends. Streams may end a
        # little before their container does.
        length = max(length, self.duration)
        short = length + 1 < declared and abs(end - declared) > 1
        if (scan.broken or short) and not self.keep:
            of = f" of {declared:.1f}" if declared else ""
            why = f": {reason(scan.broken)}" if scan.broken else ""
            raise ValueError(
                f"{self.name}: truncated after {length:.1f}{of} s ({len(self)} frames){why}; "
                "on_error='keep' makes do with those"
            )
        if scan.damaged is not None and not self.keep:
            seconds = np.ptp(pts[: scan.damaged + 1]) * self.tick
            raise ValueError(f"{self.name}: damaged after {seconds:.1f} s; on_error='keep' makes do with the rest")
        self._check_duration(self.duration)

    def _set_times(self, packets: Packets, delay: int, end: int | None) -> None:
        """Set `times` and `duration`, and for each frame, in the order shown, the position of its packet in the file.

        Args:
            delay: packets that the decoder takes before it gives the first frame.
            end: ticks at which the last frame leaves the screen, if known.
        """
        restart = packets.restart(self.tick)
        if restart is not None:
            if not self.keep:
                raise ValueError(
                    f"{self.name}: its clock starts anew after {restart} of {len(packets)} frames, as where files "
                    "were strung together: remux it; on_error='keep' makes do with those"
                )
            packets = packets.head(restart)
            # No jumps to key frames: one of the same time may follow.
            packets.key[:] = False
        by_decoder = restart is None and packets.timed.all()
        if self.matroska and packets.time_first_frames(1 / self.rate / self.tick):
            self.in_order = True

        pts, known, durations = packets.pts, packets.known, packets.durations
        key = packets.key & known
        if 2 * known.sum() < len(known):
            # A raw stream, not in a container; or H.264 in an MPEG programme stream.
            pts = np.arange(len(pts))
            known = np.ones_like(known)
            durations = np.ones(len(pts))
            self.tick = 1 / self.rate
            self.in_order = True
            by_decoder = False
        elif key.any():
            # A recording may start anywhere, but what is shown before its first key frame is lost.
            known = known & (pts >= pts[key][0])

        positions = np.flatnonzero(known & ~packets.discard)
        if not len(positions):
            raise ValueError(f"{self.name}: no frames in its video stream")
        positions = positions[np.argsort(pts[positions], kind="stable")]
        if not self.in_order:
            # Two packets of one time are two fields of one frame.
            positions = positions[np.diff(pts[positions], prepend=pts[positions[0]] - 1) > 0]
        # Frames that come in order are only counted; of some, libav makes up the same time.
        self.pts = np.arange(len(pts)) if self.in_order else pts
        self.dts = packets.dts
        self.key = key
        self.positions = positions
        # For each frame, the first frame of the same packet: edits may repeat one.
        self.same = range(len(positions))

        ticks = pts[positions]
        if self.in_order and by_decoder:
            ticks = decoder_ticks(packets.dts[positions], delay)
        if end is None or end <= ticks[-1]:
            step = np.median(np.diff(ticks)) if len(ticks) > 1 else 1 / self.rate
            end = ticks[-1] + (durations[positions[-1]] or step)

        if self.edits:
            times, duration = self._edit(ticks, end)
        else:
            times = (ticks - ticks[0]) * self.tick
            duration = float((end - ticks[0]) * self.tick)
        self.times, self.duration = without_rounding(times, duration, self.rate)

    def _edit(self, ticks: np.ndarray, end: int) -> tuple[np.ndarray, float]:
        """Put the frames in the order of `self.edits`, which may leave out and repeat frames.

        Args:
            ticks: [frames], the frames' own times.
            end: ticks at which the last frame ends.

        Returns:
            The times of the frames shown, in seconds from the first, and the duration.
        """
        shown, times = [], []
        now = last = 0.0
        for edit in self.edits:
            if edit.start is None:
                now += edit.seconds
                continue

            stop = end if edit.stop is None else edit.stop
            first, after = np.searchsorted(ticks, (edit.start, stop))
            if edit.rate == 0:
                after = np.searchsorted(ticks, edit.start, side="right").clip(1)
                first = after - 1
            if sum(map(len, shown)) + after - first > MAX_FRAMES:
                raise ValueError(f"{self.name}: more than {MAX_FRAMES:,} frames by its edit list, the limit")
            shown.append(np.arange(first, after))
            times.append(now + (ticks[first:after] - edit.start) * self.tick / (edit.rate or math.inf))
            seconds = (stop - edit.start) * self.tick if edit.seconds is None else edit.seconds
            now = last = now + seconds

        shown, times = np.concatenate(shown), np.concatenate(times)
        if not len(shown):
            raise ValueError(f"{self.name}: no frames in its video stream, by its edit list")
        self.positions = self.positions[shown]
        _, first, same = np.unique(self.positions, return_index=True, return_inverse=True)
        self.same = first[same]
        return times - times[0], last - times[0]

    def _decode(self, wanted: list[int], store: Callable[[int, np.ndarray], None]) -> set[int]:
        """Call `store(index, pixels)`, pixels uint8 [height, width, 3], for each frame wanted.

        The calls come in any order and from several threads. Returns the frames that cannot be decoded; there are
        none unless `on_error="keep"`.
        """
        todo = {int(self.pts[self.positions[i]]): i for i in wanted}
        if not self.in_order:
            stretches, decoders, threads = self._divide(self.positions[wanted])
            if decoders == 1:
                self._decode_stretches(stretches, todo, store, threads)
            else:
                self._decode_side_by_side(stretches, todo, store, decoders, threads)
        if todo:
            # What a container calls a key frame may not be one: then frames come out damaged, or not at all.
            whole = [(0, len(self.pts) - 1)]
            problem = self._decode_stretches(whole, todo, store, self._threads(), skip=False, damaged=self.keep)
        if todo and not self.keep:
            raise ValueError(
                f"{self.name}: truncated or damaged, {len(wanted) - len(todo)} of {len(wanted)} frames could be "
                f"decoded: {problem}; on_error='keep' makes do with those"
            )
        return set(todo.values())

    def _decode_side_by_side(self, stretches, todo: dict[int, int], store, decoders: int, threads: int) -> None:
        """`_decode_stretches` by several decoders, which take their stretches from one iterator."""
        stretches = iter(stretches)
        with ThreadPoolExecutor(decoders) as pool:
            jobs = [pool.submit(self._decode_stretches, stretches, todo, store, threads) for _ in range(decoders)]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                # The other decoders stop once nothing is wanted.
                todo.clear()
                raise

    def _decode_stretches(
        self, stretches: Iterable[tuple[int, int]], todo: dict[int, int], store, threads: int, skip=True, damaged=False
    ) -> str | Exception:
        """Decode stretches of the file, and move frames from `todo` ({pts: index}) to `store`.

        Args:
            threads: of the decoder.
            skip: see `_frames`.
            damaged: whether to take damaged frames, too.

        Returns:
            Why frames may be left in `todo`.
        """
        reformatter = VideoReformatter()
        with contextlib.closing(self._frames(stretches, todo, threads, skip)) as frames:
            try:
                for pts, frame in frames:
                    if frame.is_corrupt and not damaged:
                        return "a packet is damaged"
                    # Another thread may have taken the frame.
                    if (i := todo.pop(pts, None)) is not None:
                        store(i, self._pixels(frame, reformatter))
            except av.FFmpegError as error:
                return error
        return "the stream ends"

    def _divide(self, positions: np.ndarray) -> tuple[list[tuple[int, int]], int, int]:
        """How to decode the frames at `positions`: stretches of the file, decoders side by side, threads of each."""
        threads = self._threads()
        stretches = self._stretches(positions, MIN_WORK)
        lengths = [last - first + 1 for first, last in stretches]
        decoders = min(threads, DECODER_MEMORY // (28 * self.pixels), sum(lengths) // max([*lengths, MIN_WORK]))
        once = not isinstance(self.source, str) or "://" in self.source  # cannot be opened twice
        if decoders < 2 or once:
            return self._stretches(positions), 1, threads
        return stretches, decoders, threads // decoders

    def _threads(self) -> int:
        return max(min(torch.get_num_threads(), THREAD_MEMORY // (3 * self.pixels)), 1)

    def _stretches(self, positions: np.ndarray, length: float = math.inf) -> list[tuple[int, int]]:
        """First and last position in the file of the packets to decode for the frames at `positions`.

        A stretch of `length` packets or more ends before the next key frame.
        """
        keys = np.flatnonzero(self.key)
        ends = {}  # the last position to decode from each key frame
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

        With `skip`, frames that no wanted frame depends on are left out within a stretch, too: frames that no other
        refers to, and those shown before the key frame that starts the stretch, which could not be decoded.
        """
        if threads > 1:
            threads_were_used.set()
        with self._open(threads) as (container, stream):
            context = stream.codec_context
            count = 0  # frames that the decoder gave
            intra = skip and context.codec.intra_only
            unreferenced = skip and context.name in SKIP_UNREFERENCED

            def decode(packet) -> Iterator[tuple[int, av.VideoFrame]]:
                nonlocal count
                try:
                    frames = context.decode(packet)
                except av.FFmpegError:
                    if not self.keep:
                        raise
                    frames = []
                    count += 1
                for frame in frames:
                    pts = int(self.pts[self.positions[count]]) if self.in_order and count < len(self) else frame.pts
                    count += 1
                    if pts in wanted:
                        yield pts, frame

            packets = self._packets(container, stream)
            position = 0  # of the packet to come
            for first, last in stretches:
                if position <= first <= position + MIN_JUMP:
                    context.flush_buffers()
                    packet = next(packets, None)
                else:
                    container.seek(int(self.dts[first]), stream=stream)
                    packets = self._packets(container, stream)
                    packet = next((p for p in packets if p.pts == self.pts[first] and p.is_keyframe), None)
                    if packet is None:
                        return
                    position = first

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
                # Without this, a colon in a path would mark a protocol.
                source = f"file:{source}"
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
            context.thread_count = threads
            context.thread_type = "AUTO"
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
    # The margin covers the rounding of floats.
    return np.searchsorted(times, moments + 1e-8, side="right").clip(1) - 1


def orientation(frame: av.VideoFrame | None) -> tuple[int, bool]:
    """How to show a frame upright: (quarter turns counterclockwise, whether to mirror left to right before that).

    It is the nearest to the frame's display matrix; a matrix that cannot be inverted is ignored.
    """
    try:
        side = frame and frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:
        # PyAV has no name for some other side data of the frame.
        turns = round(frame.rotation / 90) % 4 if abs(frame.rotation) <= 360 else 0
        return turns, False
    if not side:
        return 0, False

    a, b, _, c, d = (int(x) for x in np.frombuffer(side, np.int32)[:5])
    mirrored = a * d < b * c
    if a * d == b * c:
        return 0, False
    if mirrored:
        a, b = -a, -b
    return -round(math.atan2(b - c, a + d) / (math.pi / 2)) % 4, mirrored


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
    plane = rgb.planes[0]
    channels = 4 if alpha else 3
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    pixels = rows[:, : channels * plane.width].reshape(plane.height, plane.width, channels)
    if alpha:
        opacity = pixels[..., 3:] / np.float32(255)
        pixels = (pixels[..., :3] * opacity + 255 * (1 - opacity)).round().astype(np.uint8)
    return pixels


def resize_bicubic(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tvF.resize(frame, [height, width], interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
