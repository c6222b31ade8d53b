"""Reads the packets of a video file, which tell the times of its frames before any is decoded.

`video_reader.py` puts the frames in order by them.
"""

from array import array
from dataclasses import dataclass

import av
import numpy as np

from .video_planner import ROUNDING


@dataclass
class Packets:
    """The packets of a stream, in the order of the file; times in ticks of the stream."""

    pts: np.ndarray  # int64 [packets], presentation time; 0 if unknown
    dts: np.ndarray  # int64 [packets], decoding time; `pts` if unknown
    durations: np.ndarray  # int64 [packets], 0 if unknown
    known: np.ndarray  # bool [packets], whether the presentation time is known
    timed: np.ndarray  # bool [packets], whether the decoding time is known
    key: np.ndarray  # bool [packets], key frames
    discard: np.ndarray  # bool [packets], to be decoded but not shown

    def __len__(self) -> int:
        return len(self.pts)

    def head(self, count: int) -> "Packets":
        """Views of the first packets."""
        return Packets(*(values[:count] for values in vars(self).values()))

    def restart(self, tick: float) -> int | None:
        """The position of the packet at which the clock starts anew, if it does; `tick` is in seconds."""
        timed = np.flatnonzero(self.timed)
        restarts = timed[1:][np.diff(self.dts[timed]) * tick < -1]
        return int(restarts[0]) if len(restarts) else None

    def time_first_frames(self, step: float) -> bool:
        """Give times to the frames of a Matroska file that start before zero. Returns whether there are any.

        libav knows no times below zero, so that the packets without a time are the first frames, in order. They are
        `step` ticks apart if their durations are unknown.
        """
        untimed = np.flatnonzero(~self.known)
        if not 0 < 2 * len(untimed) <= len(self):
            return False
        step = int(np.median(self.durations[untimed])) or round(step)
        self.pts[untimed] = self.pts[self.known].min() - step * np.arange(len(untimed), 0, -1)
        self.known[:] = True
        return True


@dataclass
class Scan:
    """What reading all packets of a file tells."""

    packets: Packets
    spans: list[tuple[float, float]]  # of each other stream: seconds at which it begins and ends
    first: av.VideoFrame | None  # the first frame
    fed: int  # packets that the decoder took until it gave that frame
    broken: Exception | None  # what ended the reading early
    damaged: int | None  # the first packet that is marked as damaged


def read_packets(container, stream) -> Scan:
    """Read the packets of all streams, and decode those of `stream` until the first frame."""
    pts, dts, durations = array("q"), array("q"), array("q")
    known, timed, key, discard = array("b"), array("b"), array("b"), array("b")
    first = broken = damaged = None
    fed = 0
    others = {}  # stream: its earliest and latest time, in its ticks
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
                first = first_frame(packet)
                fed += 1
            if packet.size:
                known.append(packet.pts is not None)
                timed.append(packet.dts is not None)
                key.append(packet.is_keyframe)
                discard.append(packet.is_discard)
                pts.append(packet.pts if known[-1] else 0)
                dts.append(packet.dts if timed[-1] else pts[-1])
                durations.append(packet.duration or 0)
    except av.FFmpegError as error:
        # libav takes the end of an mpjpeg file for damage.
        broken = error if container.format.name != "mpjpeg" else None

    times = [np.asarray(values) for values in (pts, dts, durations)]
    flags = [np.asarray(values).view(bool) for values in (known, timed, key, discard)]
    spans = [(begin * float(s.time_base), end * float(s.time_base)) for s, (begin, end) in others.items()]
    return Scan(Packets(*times, *flags), spans, first, fed, broken, damaged)


def first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.FFmpegError:
        # Reading the frames will raise a clear error.
        return None


def decoder_ticks(dts: np.ndarray, delay: int) -> np.ndarray:
    """When a decoder gives its frames: at the time of the packet that it then takes, `delay` packets later."""
    ticks = np.sort(dts)
    delay = min(delay, len(ticks) - 1)
    step = ticks[-1] - ticks[-2:][0]
    return np.append(ticks[delay:], ticks[-1] + step * np.arange(1, delay + 1))


def without_rounding(times: np.ndarray, duration: float, rate: float) -> tuple[np.ndarray, float]:
    """Times and duration in seconds, without the rounding of containers if a constant rate explains them."""
    at_rate = len(times) / rate
    if abs(duration - at_rate) < ROUNDING:
        duration = at_rate
    constant = np.arange(len(times)) * (duration / len(times))
    return (constant if np.abs(times - constant).max() < ROUNDING else times), duration
