"""Opens what a video may come from: a path, bytes, an open file, or a URL, which is downloaded first.

`video_reader.py` reads what this module opens. No video is decoded here.
"""

import contextlib
import http.client
import io
import os
import re
import tempfile
import urllib.request
from typing import BinaryIO
from urllib.parse import quote, unquote

from transformers.utils import logging

# Bytes that a server or a pipe may send.
MAX_DOWNLOAD = 64 * 2**30
# What demuxers that open other files and sockets know their files by.
REFERENCES = b"ffconcat version", b"#extm3u", b"<mpd", b"c=in ip"


def local_path(path: str | os.PathLike) -> str:
    """A path as a str; `file://` becomes a plain path, other URLs stay as they are."""
    path = os.fspath(path)
    file = re.match(r"file://(localhost(?=/))?", path, re.IGNORECASE)
    return unquote(path[file.end() :]) if file else path


def open_source(source, timeout: float, keep: bool) -> tuple[str, str | BinaryIO, bool]:
    """(name, what PyAV can open again and again, whether that is a temporary file)."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError("<bytes>: empty")
        return "<bytes>", io.BytesIO(source), False
    if hasattr(source, "read"):
        name = str(getattr(source, "name", f"<{type(source).__name__}>"))
        if not isinstance(source.read(0), bytes):
            raise ValueError(f"{name}: the file must be opened in binary mode")
        return (name, source, False) if source.seekable() else (name, copy_to_temporary(source, name, keep=keep), True)
    path = local_path(source)
    if "://" in path:
        name = re.sub("(?<=://)[^/@]*@", "", re.split("[?#]", path)[0])  # without passwords and tokens
        web = path.lower().startswith(("http://", "https://"))
        return (name, download(path, name, timeout, keep), True) if web else (name, path, False)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such video file")
    if os.path.isdir(path):
        raise ValueError(f"{path}: a directory, without images")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty")
    return path, path, False


def download(url: str, name: str, timeout: float, keep: bool) -> BinaryIO:
    """A temporary file of what a server sends."""
    try:
        request = urllib.request.Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "videonsa"})
        response = urllib.request.urlopen(request, timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{name}: cannot be downloaded: {error}") from error
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


def refers_to_others(source: str | BinaryIO) -> bool:
    """Whether libav would open what the file, or the one at a path, names: told from its text, up to a zero byte."""
    with contextlib.nullcontext(source) if not isinstance(source, str) else open(source, "rb") as file:
        file.seek(0)
        text = file.read(2**20).partition(b"\0")[0].lower()  # as much as libav looks at
    return any(mark in text for mark in REFERENCES)
