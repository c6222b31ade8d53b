"""Opens the sources of videos: paths, bytes, open files, and URLs, which are downloaded first.

`video_reader.py` reads what this module opens. No video is decoded here.
"""

import base64
import binascii
import contextlib
import http.client
import io
import os
import re
import struct
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes

from transformers.utils import logging

from .video_planner import shorten

# The most bytes that a server or a pipe may send.
MAX_DOWNLOAD = 64 * 2**30
# Texts by which libav recognises files that make it open other files and sockets.
REFERENCES = (b"ffconcat version", b"#extm3u", b"<mpd", b"c=in ip")
# The most bytes of a list of edits, and the most boxes side by side, that are read.
MAX_EDITS = 2**20
MAX_BOXES = 2**12
# The first bytes of the properties of an ASF file.
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def local_path(path: str | os.PathLike) -> str:
    """A path as a str; `file://` becomes a plain path, other URLs stay as they are."""
    path = os.fspath(path)
    file = re.match(r"file://(localhost(?=/))?", path, re.IGNORECASE)
    return unquote(path[file.end() :]) if file else path


class Source(NamedTuple):
    """Something that can be read several times."""

    name: str  # for errors
    file: str | BinaryIO  # a path, a URL that libav opens, or a file
    temporary: bool = False  # whether `close` closes the file

    def close(self) -> None:
        if self.temporary:
            self.file.close()


def open_source(source, timeout: float, keep: bool) -> Source:
    """A `Source` of a path, URL, bytes or binary file.

    Args:
        timeout: seconds that a server may take to answer or to go on.
        keep: whether to use what came before a download or a pipe broke off.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError("<bytes>: empty")
        return Source("<bytes>", io.BytesIO(source))
    if hasattr(source, "read"):
        name = shorten(getattr(source, "name", f"<{type(source).__name__}>"))
        if not isinstance(source.read(0), bytes):
            raise ValueError(f"{name}: the file must be opened in binary mode")
        if source.seekable():
            return Source(name, source)
        return Source(name, copy_to_temporary(source, name, keep=keep), True)

    path = local_path(source)
    if is_data_url(path):
        return read_data_url(path)
    if "://" in path:
        # Errors show no passwords and tokens.
        name = shorten(re.sub("(?<=://)[^/@]*@", "", re.split("[?#]", path)[0]))
        if path.lower().startswith(("http://", "https://")):
            return Source(name, download(path, name, timeout, keep), True)
        return Source(name, path)

    name = shorten(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}: no such video file")
    if os.path.isdir(path):
        raise ValueError(f"{name}: a directory, without images")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name}: the file is empty")
    return Source(name, path)


def is_data_url(path: str) -> bool:
    return path[:5].lower() == "data:"


def read_data_url(url: str) -> Source:
    """The content of a `data:` URL (RFC 2397), such as `data:video/mp4;base64,AAAA…`."""
    header, comma, data = url.partition(",")
    name = f"<{shorten(header, 100)}>"
    if len(data) > MAX_DOWNLOAD:
        raise ValueError(f"{name}: more than {MAX_DOWNLOAD:,} bytes, the limit")

    content = unquote_to_bytes(data)
    if header.lower().endswith(";base64"):
        # Some encoders leave out the padding, break lines, or use the alphabet for URLs.
        content = b"".join(content.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name}: no valid base64: {error}") from error
    if not content:
        raise ValueError(f"{name}: empty")
    return Source(name, io.BytesIO(content))


def download(url: str, name: str, timeout: float, keep: bool) -> BinaryIO:
    """A temporary file with what a server sends."""
    try:
        url = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(url, headers={"User-Agent": "videonsa"})
        response = urllib.request.urlopen(request, timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{name}: cannot be downloaded: {shorten(error)}") from error
    with response:
        size = response.headers["Content-Length"] or ""
        return copy_to_temporary(response, name, int(size) if size.isdecimal() else 0, keep)


def copy_to_temporary(stream: BinaryIO, name: str, size: int = 0, keep: bool = False) -> BinaryIO:
    """A temporary file with the content of a stream; the caller closes it.

    Args:
        name: for errors.
        size: bytes to expect; 0 if unknown.
        keep: whether to use what came before the stream broke off.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115
    problem = None
    # `read1` returns what has come so far, and does not wait for all the bytes asked for.
    read = getattr(stream, "read1", stream.read)
    try:
        options = {"desc": os.path.basename(name), "unit": "B", "unit_scale": True, "delay": 3, "leave": False}
        with logging.tqdm(total=size or None, **options) as progress:
            while max(file.tell(), size) <= MAX_DOWNLOAD:
                try:
                    part = read(2**20)
                except (OSError, http.client.HTTPException) as error:
                    part = b""
                    problem = error
                if not part:
                    break
                progress.update(file.write(part))

        received = file.tell()
        if max(received, size) > MAX_DOWNLOAD:
            raise ValueError(f"{name}: more than {MAX_DOWNLOAD:,} bytes, the limit")
        if (problem or received < size) and not (keep and received):
            of = f" of {size:,}" if size else ""
            why = f": {problem}" if problem else ""
            raise ValueError(
                f"{name}: truncated after {received:,}{of} bytes{why}; on_error='keep' makes do with those"
            ) from problem
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def opened(source: str | BinaryIO) -> Iterator[BinaryIO]:
    """A path or a file, to be read from its start."""
    with open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as file:
        file.seek(0)
        yield file


def refers_to_others(source: str | BinaryIO) -> bool:
    """Whether libav would open other files that this one names. The text before the first zero byte tells."""
    with opened(source) as file:
        # libav looks at as many bytes.
        text = file.read(2**20).partition(b"\0")[0].lower()
    return any(mark in text for mark in REFERENCES)


@dataclass(frozen=True)
class Edit:
    """A part of a track as it is shown: the frames from `start` until before `stop`, or a gap."""

    seconds: float | None  # how long it is shown; None for a part up to the end of the track
    start: int | None  # ticks of the track; None for a gap, which shows nothing
    stop: int | None = None  # ticks; None for the end of the track
    rate: float = 1.0  # speed; 0 for a frame that stays


def movie_edits(source: str | BinaryIO, track: int) -> list[Edit] | None:
    """The list of edits of a track of an MP4 or QuickTime file (ISO/IEC 14496-12, 8.6.6).

    Args:
        track: number of the track.

    Returns:
        None if there is no list, if it cannot be read, or if all of it is one ordinary part.
    """
    if isinstance(source, str) and "://" in source:
        return None
    with opened(source) as file, contextlib.suppress(struct.error, ZeroDivisionError):
        movie = find_box(file, [b"moov"], 0, file.seek(0, os.SEEK_END))
        if not movie:
            return None
        movie_ticks, _ = read_clock(file, find_box(file, [b"mvhd"], *movie))
        fragmented = find_box(file, [b"mvex"], *movie) is not None
        for kind, *inside in read_boxes(file, *movie):
            header = find_box(file, [b"tkhd"], *inside) if kind == b"trak" else None
            entries = find_box(file, [b"edts", b"elst"], *inside) if header else None
            if entries and read_clock(file, header)[0] == track:
                track_ticks, _ = read_clock(file, find_box(file, [b"mdia", b"mdhd"], *inside))
                return make_edits(read_entries(file, *entries), movie_ticks, track_ticks, fragmented)
    return None


def read_entries(file: BinaryIO, start: int, end: int) -> list[tuple[int, int, int]]:
    """The entries of a list of edits, as the file has them: (duration, start, 2^16 · rate)."""
    file.seek(start)
    content = file.read(min(end - start, MAX_EDITS))
    version, count = struct.unpack_from(">B3xI", content)
    entry = struct.Struct(">QqI" if version == 1 else ">IiI")
    count = min(count, (len(content) - 8) // entry.size)
    return [entry.unpack_from(content, 8 + i * entry.size) for i in range(count)]


def make_edits(
    entries: list[tuple[int, int, int]], movie_ticks: int, track_ticks: int, fragmented: bool
) -> list[Edit] | None:
    """Edits from the entries of a file; None as in `movie_edits`.

    Args:
        entries: (duration, start, 2^16 · rate). The duration counts ticks of the movie, the start ticks of the track.
        movie_ticks, track_ticks: ticks per second.
        fragmented: whether the file has fragments; a last entry without a duration then lasts to the end.
    """
    if len(entries) == 1 and entries[0][1] >= 0 and entries[0][2] == 1 << 16:
        return None
    edits = []
    for i, (duration, start, fixed_rate) in enumerate(entries):
        # Negative rates are not shown backwards.
        rate = fixed_rate / 2**16 if fixed_rate < 2**31 else 1.0
        seconds = duration / movie_ticks
        if start == -1:
            edits.append(Edit(seconds, None))
        elif fragmented and not duration and i == len(entries) - 1:
            edits.append(Edit(None, start))
        else:
            # Rounded to the nearest tick of the track, in integers.
            length = (2 * duration * track_ticks + movie_ticks) // (2 * movie_ticks)
            edits.append(Edit(seconds, start, start + round(length * rate), rate))
    return edits if any(edit.start is not None for edit in edits) else None


def read_boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the contents of the boxes from byte `start` to before byte `end` of a file."""
    for _ in range(MAX_BOXES):
        file.seek(start)
        header = file.read(min(end - start, 16))
        if len(header) < 8:
            return

        size, kind = struct.unpack_from(">I4s", header)
        inside = start + 8
        if size == 1:
            # The size needs 64 bits.
            (size,) = struct.unpack_from(">Q", header, 8)
            inside = start + 16
        stop = start + size if size else end
        if stop < inside:
            return
        yield kind, inside, min(stop, end)
        start = stop


def find_box(file: BinaryIO, path: list[bytes], start: int, end: int) -> tuple[int, int] | None:
    """Where the contents of a box start and end: `path` has its kind behind those of the boxes around it."""
    for kind in path:
        found = next((inside for name, *inside in read_boxes(file, start, end) if name == kind), None)
        if found is None:
            return None
        start, end = found
    return start, end


def read_clock(file: BinaryIO, box: tuple[int, int] | None) -> tuple[int, int]:
    """The two numbers after the dates in a header.

    In the header of a movie or of media: ticks per second, and length. In that of a track: its number, and 0.
    """
    if box is None:
        raise struct.error("no such box")
    file.seek(box[0])
    content = file.read(32)
    return struct.unpack_from(">II", content, 20 if content[:1] == b"\1" else 12)


def asf_seconds(source: str | BinaryIO) -> float:
    """Seconds that the header of an ASF (WMV) file states; 0 if it states none.

    libav ignores them if the file is not whole.
    """
    if isinstance(source, str) and "://" in source:
        return 0.0
    with opened(source) as file:
        header = file.read(2**16)
    start = header.find(ASF_PROPERTIES)
    if start < 0 or len(header) < start + 92:
        return 0.0
    played, _, preroll, flags = struct.unpack_from("<QQQI", header, start + 64)
    broadcast = flags & 1
    return 0.0 if broadcast else max(played / 1e7 - preroll / 1e3, 0.0)
