"""Where records come from: files of JSON, Parquet and webdataset, folders of these or of videos, and the Hub.

`read_entries` reads what a file holds. Videos and images inside of a Parquet file or a tar stay there: a record gets a
`Media`, which reads one of them when it is decoded.
"""

import abc
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import av
from PIL import Image
from transformers.video_utils import VideoMetadata

SUFFIXES = (".json", ".jsonl", ".parquet", ".tar")
# How the files of a split are called, as in `datasets`.
SPLITS = {
    "train": r"train(ing)?",
    "validation": r"validation|valid|val|dev|eval",
    "test": r"test(ing)?",
}
# Which of them is taken.
WANTED = {"train": ("train",), "eval": ("validation", "test"), "test": ("test", "validation")}
KINDS = {
    "video": ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ts", "webm", "wmv"),
    "image": ("bmp", "gif", "jpeg", "jpg", "png", "webp"),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")
# What is asked about a video that has no record.
ASKED = "What happens in this video?"


class BadSample(ValueError):
    """Why a record cannot be used."""


@dataclass(frozen=True)
class Media(abc.ABC):
    """A video or an image inside of a file."""

    file: str
    name: str

    @abc.abstractmethod
    def open(self) -> BinaryIO:
        """The content, from its beginning."""

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"


@dataclass(frozen=True)
class TarMember(Media):
    """A file in a tar."""

    offset: int  # bytes from the start of the tar
    size: int  # bytes

    def open(self) -> BinaryIO:
        return Window(self.file, self.offset, self.size)


@dataclass(frozen=True)
class ParquetCell(Media):
    """The value of a row and column of a Parquet file, or one of a list there."""

    group: int
    row: int  # in the group
    column: str
    item: int | None
    # What `video_header` or `image_size` says, or raises. Kept, since finding a row again reads those before it.
    header: object = field(compare=False)

    def open(self) -> BinaryIO:
        rows = read_rows(self.file, self.group, [self.column])
        value = next(itertools.islice(rows, self.row, None))[self.column]
        return io.BytesIO(content_of(value if self.item is None else value[self.item]))


class Window(io.RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, path: str, offset: int, size: int):
        self.file, self.offset, self.size, self.at = open(path, "rb", buffering=0), offset, size, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.at)])
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True)
class DataFile:
    """A file of records, or a folder of videos."""

    path: Path
    name: str  # in the ids of its samples: that of a download says nothing


@dataclass
class Entry:
    """What a file holds for a sample."""

    record: object  # as it stands in the file, media of the file as `Media`; or a BadSample
    # By kind, the media that stand beside the record, which may or may not name them.
    beside: dict[str, list[Media]] = field(default_factory=dict)


def parse_spec(spec: str) -> tuple[str, float]:
    """Name and percentage of "name" or "name%50"."""
    match = re.fullmatch(r"(.+?)(?:%(\d+(?:\.\d*)?))?", spec)
    percent = float(match[2]) if match and match[2] else 100.0
    if not match or not 0 < percent <= 100:
        raise ValueError(f"a data file is named PATH or PATH%N with 0 < N <= 100, got {spec!r}")
    return match[1], percent


def find_files(name: str, split: str, videos: bool = False) -> list[DataFile]:
    """The files of a file, a folder, or a data set of the Hub: ID, or ID:CONFIGURATION if it has several.

    Args:
        split: which part of a folder or a data set, a key of WANTED. It is told from the names of files. A folder whose
            files name no split is taken whole.
        videos: a folder of videos without records will do.

    Raises:
        FileNotFoundError, ValueError: there is no such thing, or it cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return [DataFile(path, path.name)]
    if not path.is_dir() and (path.suffix in SUFFIXES or not HUB_ID.fullmatch(name)):
        raise FileNotFoundError(f"data file {path} does not exist")

    lines = sorted(path.glob("*.jsonl"))
    if videos and not lines and path.is_dir() and holds_videos_alone(path):
        return [DataFile(path, path.name)]
    if not lines:
        return data_set_files(name, split)
    splits = {}
    for file in lines:
        splits.setdefault(split_of(file.name), []).append(DataFile(file, file.name))
    return choose_split(name, splits, split)


def holds_videos_alone(folder: Path) -> bool:
    """Whether a folder has videos, itself or in others below, and no records."""
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    return not suffixes & {*SUFFIXES} and bool(suffixes & {f".{suffix}" for suffix in KINDS["video"]})


def split_of(name: str) -> str:
    """The split that the name of a file says, or train."""
    return next(
        (split for split, words in SPLITS.items() if re.search(f"(?<![a-z])({words})(?![a-z])", name.lower())),
        "train",
    )


def choose_split(name: str, splits: dict[str, list], wanted: str) -> list:
    """The files of a split; of a data set without splits, all."""
    found = next((split for split in WANTED[wanted] if split in splits), None)
    if found is None and len(splits) != 1:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, and none of {', '.join(WANTED[wanted])}")
    return splits[found] if found else next(iter(splits.values()))


def data_set_files(name: str, split: str) -> list[DataFile]:
    """The files of a folder or a data set of the Hub that `datasets` finds; those of the Hub are downloaded."""
    try:
        from datasets import DownloadManager, load_dataset_builder
    except ImportError as error:
        raise ValueError(f"{name} is a folder or a data set of the Hub, and needs: pip install datasets") from error
    path, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        builder = load_dataset_builder(path, configuration or None)
        named = choose_split(name, builder.config.data_files or {}, split)
        wrong = sorted({Path(file).suffix for file in named} - {*SUFFIXES})
        if wrong:
            raise ValueError(f"it holds {', '.join(wrong)} files; records are read from {', '.join(SUFFIXES)}")
        paths = DownloadManager().download(list(named))
    except Exception as error:  # of many kinds: the network, the Hub, README.md, the files
        what = "folder" if Path(name).is_dir() else "neither a file or folder here nor a data set that the Hub gives"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: {what}: {reason}") from error
    return [DataFile(Path(path), Path(file).name) for path, file in zip(paths, named, strict=True)]


def read_entries(file: DataFile) -> list[Entry]:
    """The entries of a file; a list in place of a record is taken for several records.

    Raises:
        ValueError: the file is damaged, or no list of records.
    """
    if file.path.is_dir():
        return read_clips(file.path)
    suffix = Path(file.name).suffix
    if suffix == ".tar":
        return read_tar(file.path)
    if suffix == ".parquet":
        return read_parquet(file.path)
    records = read_lines(file.path) if suffix == ".jsonl" else read_json(file.path)
    flat = itertools.chain.from_iterable(record if isinstance(record, list) else [record] for record in records)
    return [Entry(record) for record in flat]


def read_clips(folder: Path) -> list[Entry]:
    """A question without an answer about each video in a folder and in others below."""

    def asked(path: Path) -> dict:
        content = [{"type": "video", "video": str(path.resolve())}, {"type": "text", "text": ASKED}]
        return {"id": str(path.relative_to(folder)), "messages": [{"role": "user", "content": content}]}

    videos = [path for path in sorted(folder.rglob("*")) if path.suffix[1:].lower() in KINDS["video"]]
    return [Entry(asked(path)) for path in videos]


def read_lines(path: Path) -> list:
    """The records of a .jsonl file."""
    # Bytes: json skips a byte order mark, and a text may hold U+2028, which ends no line.
    return [parse(line) for line in path.read_bytes().split(b"\n") if line.strip()]


def parse(text: str | bytes):
    """What a text says in JSON, or a BadSample."""
    try:
        return json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        return BadSample(f"not JSON: {error}")


def read_json(path: Path) -> list:
    """The records of a .json file."""
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        hint = "one record per line needs the suffix .jsonl"
        raise ValueError(f"data file {path} is not JSON: {error}; {hint}") from None
    if not isinstance(records, list):
        raise ValueError(f"data file {path} must hold a list of records, got {type(records).__name__}")
    return records


def read_tar(path: Path) -> list[Entry]:
    """The samples of a tar of webdataset: files of one name before the first dot, one of them .json."""
    samples = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                media = TarMember(str(path), name, member.offset_data, member.size)
                samples.setdefault((folder, key), {})[suffix.lower()] = media
    except tarfile.TarError as error:
        raise ValueError(f"data file {path} is not a tar, or a compressed one: {error}") from None

    entries = []
    for (_, key), members in samples.items():
        text = next((members[suffix] for suffix in members if suffix.split(".")[-1] == "json"), None)
        record = parse(text.read()) if text else BadSample(f"no {key}.json beside {next(iter(members.values())).name}")
        entries.append(Entry(record, by_kind(members)))
    return entries


def by_kind(media: dict[str, Media]) -> dict[str, list[Media]]:
    """Media by kind, which the end of their key tells: "mp4", "left.mp4"."""
    return {
        kind: [media[key] for key in sorted(media) if key.split(".")[-1] in suffixes]
        for kind, suffixes in KINDS.items()
    }


def read_parquet(path: Path) -> list[Entry]:
    """The rows of a Parquet file. Media are bytes, or {"bytes", "path"} as `datasets` writes them."""
    pq = import_parquet(path)
    try:
        with pq.ParquetFile(path) as file:
            groups, columns = file.num_row_groups, file.schema_arrow.names
    except (OSError, ValueError) as error:
        raise ValueError(f"data file {path} is not a Parquet file: {error}") from None
    entries = []
    for group in range(groups):
        for row, values in enumerate(read_rows(str(path), group, columns)):
            record, beside = {}, {}
            for column, value in values.items():
                value = as_media(value, str(path), group, row, column)
                kind = next((kind for kind, suffixes in KINDS.items() if column in suffixes), None)
                if kind and isinstance(value, Media):
                    beside.setdefault(kind, []).append(value)
                elif value is not None:
                    record[column] = value
            entries.append(Entry(record_of(record), beside))
    return entries


def record_of(row: dict) -> object:
    """The record of a row: the row itself, or what its column `json` holds; lists of turns may be JSON texts."""
    if "json" in row and not {"conversations", "messages"} & row.keys():
        row = parse(row["json"]) if isinstance(row["json"], str) else row["json"]
    for key in ("conversations", "messages"):
        if isinstance(row, dict) and isinstance(row.get(key), str):
            turns = parse(row[key])
            row = turns if isinstance(turns, BadSample) else {**row, key: turns}
    return row


def as_media(value, path: str, group: int, row: int, column: str, item: int | None = None):
    """A value of a Parquet file, bytes as a `ParquetCell`, and without the keys that other rows have."""
    content = content_of(value)
    if content is not None:
        name = (value.get("path") if isinstance(value, dict) else None) or f"{column} of row {row}"
        return ParquetCell(path, name, group, row, column, item, header=header_of(content, column))
    if isinstance(value, dict) and {"bytes", "path"} == value.keys():
        return value["path"]
    if isinstance(value, list):
        return [as_media(x, path, group, row, column, i if item is None else item) for i, x in enumerate(value)]
    if isinstance(value, dict):
        return {key: as_media(x, path, group, row, column) for key, x in value.items() if x is not None}
    return value


def content_of(value) -> bytes | None:
    """The bytes of a cell; None if it holds none."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


def header_of(content: bytes, column: str):
    """What the header of the content of a column says; an error is returned, as one that processes can send."""
    image = column.startswith("image") or column in KINDS["image"]
    try:
        return image_size(io.BytesIO(content)) if image else video_header(io.BytesIO(content))
    except (OSError, ValueError, av.FFmpegError, SyntaxError) as error:  # SyntaxError: a broken PNG
        return ValueError(str(error))


def read_rows(path: str, group: int, columns: list[str]) -> Iterator[dict]:
    """The rows of a group, one after the other: a group of videos may be larger than memory."""
    with import_parquet(path).ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        # Threads of Arrow do not live in the processes that a DataLoader forks.
        for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=columns, use_threads=False):
            yield from batch.to_pylist()


def import_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"data file {path} needs: pip install datasets") from error
    return pyarrow.parquet


def open_media(messages: list[dict]) -> list[dict]:
    """Messages with the content of their `Media` in a form that the processor takes."""

    def opened(part: dict) -> dict:
        source = part.get(part["type"])
        if isinstance(source, list):
            return {**part, part["type"]: [as_image(x) if isinstance(x, Media) else x for x in source]}
        if not isinstance(source, Media):
            return part
        return {**part, part["type"]: as_image(source) if part["type"] == "image" else source.read()}

    return [{**message, "content": [opened(part) for part in message["content"]]} for message in messages]


def as_image(media: Media) -> Image.Image:
    with media.open() as file, Image.open(file) as image:
        image.load()
        return image


def image_size(source: str | Media | BinaryIO) -> tuple[int, int]:
    """Width and height that the header of an image says."""
    if isinstance(source, ParquetCell):
        return header_in(source)
    if isinstance(source, Media):
        with source.open() as file:
            return image_size(file)
    with Image.open(source) as image:
        return image.size


def header_in(cell: ParquetCell):
    if isinstance(cell.header, Exception):
        raise cell.header
    return cell.header


def video_header(source: str | Media | BinaryIO) -> VideoMetadata:
    """What the header of a video says; nothing is decoded."""
    if isinstance(source, ParquetCell):
        return header_in(source)
    if isinstance(source, Media):
        with source.open() as file:
            return video_header(file)
    if isinstance(source, str) and not os.path.getsize(source):
        raise ValueError(f"{source} is empty")
    with av.open(source) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None or not stream.width:
            raise ValueError(f"{source if isinstance(source, str) else 'it'} has no video stream")
        fps = float(stream.average_rate or stream.guessed_rate or 24)
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        total = stream.frames or max(1, round(duration * fps))
        duration = duration or total / fps
        return VideoMetadata(total, fps=total / duration, width=stream.width, height=stream.height, duration=duration)
