"""Opens what a video may come from: a path, bytes, an open file, or a URL, which is downloaded first.

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

# Bytes that a server or a pipe may send.
MAX_DOWNLOAD = 64 * 2**30
# What demuxers that open other files and sockets know their files by.
REFERENCES = b"ffconcat version", b"#extm3u", b"<mpd", b"c=in ip"
# Bytes of a list of edits, and boxes side by side, that are looked at.
MAX_EDITS, MAX_BOXES = 2**20, 2**12
# What the properties of an ASF file begin with.
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def local_path(path: str | os.PathLike) -> str:
    """A path as a str; `file://` becomes a plain path, other URLs stay as they are."""
    path = os.fspath(path)
    file = re.match(r"file://(localhost(?=/))?", path, re.IGNORECASE)
    return unquote(path[file.end() :]) if file else path


class Source(NamedTuple):
    """What can be opened again and again, as errors call it; a temporary file is to be closed."""

    name: str
    file: str | BinaryIO
    temporary: bool = False

    def close(self) -> None:
        if self.temporary:
            self.file.close()


def open_source(source, timeout: float, keep: bool) -> Source:
    """A `Source` of a path, URL, bytes or binary file."""
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
        name = shorten(re.sub("(?<=://)[^/@]*@", "", re.split("[?#]", path)[0]))  # without passwords and tokens
        web = path.lower().startswith(("http://", "https://"))
        return Source(name, download(path, name, timeout, keep), True) if web else Source(name, path)
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
    """What a URL holds in itself (RFC 2397): `data:video/mp4;base64,AAAA…`."""
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
    """A temporary file of what a server sends."""
    try:
        request = urllib.request.Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "videonsa"})
        response = urllib.request.urlopen(request, timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{name}: cannot be downloaded: {shorten(error)}") from error
    with response:
        size = response.headers["Content-Length"] or ""
        return copy_to_temporary(response, name, int(size) if size.isdecimal() else 0, keep)


def copy_to_temporary(stream: BinaryIO, name: str, size: int = 0, keep: bool = False) -> BinaryIO:
    """A temporary file, which the caller closes, of what a stream gives, or with `keep` gave until it broke off."""
    file, problem = tempfile.TemporaryFile(), None  # noqa: SIM115
    read = getattr(stream, "read1", stream.read)  # which gives what has come so far
    try:
        bar = {"desc": os.path.basename(name), "unit": "B", "unit_scale": True, "delay": 3, "leave": False}
        with logging.tqdm(total=size or None, **bar) as progress:
            while max(file.tell(), size) <= MAX_DOWNLOAD:
                try:
                    part = read(2**20)
                except (OSError, http.client.HTTPException) as error:
                    part, problem = b"", error
                if not part:
                    break
                progress.update(file.write(part))
        received = file.tell()
        if max(received, size) > MAX_DOWNLOAD:
            raise ValueError(f"{name}: more than {MAX_DOWNLOAD:,} bytes, the limit")
        if (problem or received < size) and not (keep and received):
            of = f" of {size:,}" if size else ""
            raise ValueError(
                f"{name}: truncated after {received:,}{of} bytes{f': {problem}' if problem else ''}; "
                "on_error='keep' makes do with those"
            ) from problem
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def opened(source: str | BinaryIO) -> Iterator[BinaryIO]:
    """A path or a file, to be read from its start."""
    with contextlib.nullcontext(source) if not isinstance(source, str) else open(source, "rb") as file:
        file.seek(0)
        yield file


def refers_to_others(source: str | BinaryIO) -> bool:
    """Whether libav would open what the file, or the one at a path, names: told from its text, up to a zero byte."""
    with opened(source) as file:
        text = file.read(2**20).partition(b"\0")[0].lower()  # as much as libav looks at
    return any(mark in text for mark in REFERENCES)


@dataclass(frozen=True)
class Edit:
    """A part of a track, as shown: its frames from `start` until before `stop`, in ticks of the track, in that many
    seconds. Without a start nothing is shown. At a rate of 0 a frame stays. None is to the end of the track."""

    seconds: float | None
    start: int | None
    stop: int | None = None
    rate: float = 1.0


def movie_edits(source: str | BinaryIO, track: int) -> list[Edit] | None:
    """The edits of a track of an MP4 or QuickTime file (ISO/IEC 14496-12, 8.6.6), by the track's number; None if there
    is no list, or one of a single ordinary part, or if it cannot be read."""
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
            if not entries or read_clock(file, header)[0] != track:
                continue
            ticks, _ = read_clock(file, find_box(file, [b"mdia", b"mdhd"], *inside))
            file.seek(entries[0])
            content = file.read(min(entries[1] - entries[0], MAX_EDITS))
            version, count = struct.unpack_from(">B3xI", content)
            entry = struct.Struct(">QqI" if version == 1 else ">IiI")
            count = min(count, (len(content) - 8) // entry.size)
            listed = [entry.unpack_from(content, 8 + i * entry.size) for i in range(count)]
            return make_edits(listed, movie_ticks, ticks, fragmented)
    return None


def make_edits(listed: list[tuple[int, int, int]], movie: int, track: int, fragmented: bool) -> list[Edit] | None:
    """From (duration, start, rate · 2^16) in a file, durations in ticks of the movie, of which there are so many a
    second, to edits."""
    if len(listed) == 1 and listed[0][1] >= 0 and listed[0][2] == 1 << 16:
        return None
    edits = []
    for i, (duration, start, rate) in enumerate(listed):
        rate = rate / 2**16 if rate < 2**31 else 1.0
        if start == -1:
            edits.append(Edit(duration / movie, None))
        elif fragmented and not duration and i == len(listed) - 1:
            edits.append(Edit(None, start))
        else:
            length = (2 * duration * track + movie) // (2 * movie)
            edits.append(Edit(duration / movie, start, start + round(length * rate), rate))
    return edits if any(edit.start is not None for edit in edits) else None


def read_boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, byte behind the last) of what the boxes of a stretch of a file hold."""
    for _ in range(MAX_BOXES):
        file.seek(start)
        header = file.read(min(end - start, 16))
        if len(header) < 8:
            return
        size, kind = struct.unpack_from(">I4s", header)
        inside = start + 8
        if size == 1:
            size, inside = struct.unpack_from(">Q", header, 8)[0], start + 16
        stop = start + size if size else end
        if stop < inside:
            return
        yield kind, inside, min(stop, end)
        start = stop


def find_box(file: BinaryIO, path: list[bytes], start: int, end: int) -> tuple[int, int] | None:
    """Where the contents of the first box of each kind, one in the other, start and end."""
    for kind in path:
        found = next((inside for name, *inside in read_boxes(file, start, end) if name == kind), None)
        if found is None:
            return None
        start, end = found
    return start, end


def read_clock(file: BinaryIO, box: tuple[int, int] | None) -> tuple[int, int]:
    """The two numbers after the dates in a header: ticks a second and length, or of a track its number and 0."""
    if box is None:
        raise struct.error("no such box")
    file.seek(box[0])
    content = file.read(32)
    return struct.unpack_from(">II", content, 20 if content[:1] == b"\1" else 12)


def asf_seconds(source: str | BinaryIO) -> float:
    """Seconds that the header of an ASF (WMV) file states: libav believes it only if the file is whole."""
    if isinstance(source, str) and "://" in source:
        return 0.0
    with opened(source) as file:
        header = file.read(2**16)
    start = header.find(ASF_PROPERTIES)
    if start < 0 or len(header) < start + 92:
        return 0.0
    played, _, preroll, flags = struct.unpack_from("<QQQI", header, start + 64)
    return 0.0 if flags & 1 else max(played / 1e7 - preroll / 1e3, 0.0)
