"""Edits of files that no muxer writes: boxes of MP4, and times of blocks in Matroska."""

import struct
from collections.abc import Callable
from pathlib import Path

CONTAINERS = {b"moov", b"trak", b"edts", b"mdia"}
MASTERS = {b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\xa0"}  # segment, cluster, block group
BLOCKS = {b"\xa3", b"\xa1"}


def rebuild(data: bytes, change: Callable[[bytes, bytes], bytes]) -> bytes:
    """An MP4 whose boxes hold what `change(kind, content)` makes of them; its index must stand at the end."""
    result, position = b"", 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + size]
        content = rebuild(content, change) if kind in CONTAINERS else change(kind, content)
        result += struct.pack(">I4s", len(content) + 8, kind) + content
        position += size
    return result


def with_matrix(source: Path, output: Path, values: tuple[float, ...]) -> Path:
    """A copy of a clip with another display matrix: its nine numbers row by row."""
    scale = (1 << 16, 1 << 16, 1 << 30)
    matrix = struct.pack(">9i", *(round(value * scale[i % 3]) for i, value in enumerate(values)))

    def change(kind: bytes, content: bytes) -> bytes:
        return content[:40] + matrix + content[76:] if kind == b"tkhd" else content

    output.write_bytes(rebuild(source.read_bytes(), change))
    return output


def with_edits(source: Path, output: Path, edits: list[tuple[float, float | None, float]]) -> Path:
    """A copy of a clip with another list of edits: (seconds, first moment shown or None for nothing, rate)."""
    ticks = {}

    def look(kind: bytes, content: bytes) -> bytes:
        if kind in (b"mvhd", b"mdhd"):
            ticks[kind] = struct.unpack_from(">I", content, 12)[0]
        if kind == b"elst":
            ticks[kind] = struct.unpack_from(">i", content, 12)[0]  # what the clip itself begins with
        return content

    def change(kind: bytes, content: bytes) -> bytes:
        if kind != b"elst":
            return content
        entries = [
            struct.pack(
                ">IiI",
                round(seconds * ticks[b"mvhd"]),
                -1 if start is None else round(start * ticks[b"mdhd"]) + ticks[b"elst"],
                round(rate * 65536),
            )
            for seconds, start, rate in edits
        ]
        return struct.pack(">II", 0, len(entries)) + b"".join(entries)

    data = source.read_bytes()
    rebuild(data, look)
    output.write_bytes(rebuild(data, change))
    return output


def move_blocks(data: bytes, milliseconds: int) -> bytes:
    """A Matroska file whose blocks come that much later in their clusters."""
    data = bytearray(data)

    def number(at: int, mask: bool) -> tuple[int, int]:
        """A variable-length number, with its marker or without, and its length."""
        length = 9 - data[at].bit_length()
        value = int.from_bytes(data[at : at + length], "big")
        return (value & (1 << 7 * length) - 1 if mask else value), length

    def walk(at: int, end: int) -> None:
        while at < end:
            _, length = number(at, False)
            kind = bytes(data[at : at + length])
            size, more = number(at + length, True)
            at += length + more
            if kind in MASTERS:
                walk(at, min(at + size, end))
            elif kind in BLOCKS:
                where = at + number(at, True)[1]
                moved = struct.unpack_from(">h", data, where)[0] + milliseconds
                struct.pack_into(">h", data, where, moved)
            at += size

    walk(0, len(data))
    return bytes(data)
