"""The forms in which users give videos, their frames and their metadata, each brought to one form.

`processing_videonsa.py` turns that into model inputs. Here, files are only told from frames; `video_reader.py` reads
them.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import infer_channel_dimension_format
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .video_planner import COUNTS, RIVALS, VideoPlan, shorten
from .video_reader import VideoFile
from .video_source import Source, is_data_url, local_path, open_source, opened

# Names of still images. What a file is, its first bytes tell; names have to do for what is on a server.
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".heic", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
# The first bytes of images; a dot stands for any byte.
IMAGE_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|II\*\0|MM\0\*|II\+\0|MM\0\+|BM....\0\0\0\0|P[1-6]\s"
    rb"|....ftyp(avif|mif1|heic|heix)|\0\0\0\x0cjP  ",
    re.DOTALL,
)
# Files of these formats may hold several pictures; libav reads only one.
PAGED_FORMATS = ("WEBP", "TIFF")
# Keys that a video of a conversation may have of its own, by their names in qwen_vl_utils too; then those it may not.
CLIP_KEYS = {
    **{key: key for key in ("fps", "num_frames", "max_pixels", "frame_tokens", "max_tokens", "prefer", "start", "end")},
    **{key: key for key in ("min_frames", "max_frames", "min_pixels", "text_tokens", "block_size", "on_error")},
    "nframes": "num_frames",
    "video_start": "start",
    "video_end": "end",
}
NO_CLIP_KEYS = {"total_pixels", "resized_height", "resized_width", "timeout", "max_source_pixels", "max_duration"}
# Keys of a list of frames: its rate, the first that is given; in qwen_vl_utils the second is that of the source.
RATE_KEYS = ("sample_fps", "raw_fps")
# Settings that are numbers: they may be given as texts, or in a call as a list with one for each video.
NUMBERS = (*COUNTS, "text_tokens", "fps", "start", "end")

logger = logging.get_logger(__name__)


class VideoClip:
    """A video with settings of its own, which go before those of the call: `VideoClip("a.mp4", {"start": 60})`.

    No dataclass: transformers 5.24 makes dictionaries of the dataclasses in a message.
    """

    def __init__(self, source: Any, settings: dict[str, Any]):
        self.source = source
        self.settings = settings


@dataclass
class SampledVideoMetadata(VideoMetadata):
    """Metadata of the frames taken of a video, or before sampling of all. `fps` is the mean rate of the video."""

    frame_times: list[float] | None = None  # seconds from the first frame of the video at which those taken begin
    sample_times: list[float] | None = None  # and at which they were looked for, being on screen then
    plan: VideoPlan | None = None

    @property
    def timestamps(self) -> list[float]:
        return self.frame_times

    @property
    def sampled_fps(self) -> float:
        return self.plan.fps if self.plan else super().sampled_fps


class Frames(list):
    """A list of images that are the frames of one video, whatever they are called."""


class Animation(Sequence):
    """The pictures of an animated WebP or of a TIFF of several pages, decoded as they are asked for.

    Attributes:
        name: what errors call the file.
        times: seconds from the first at which they begin; None for TIFF, which does not say.
        duration: seconds; None for TIFF.
    """

    def __init__(self, image: Image.Image, name: str, max_seconds: float):
        self.image, self.name = image, name
        self.times = self.duration = None
        self.pages = range(image.n_frames)
        if image.format == "TIFF":
            # Pages of other sizes are previews or masks.
            sizes = [self._seek(page).size for page in self.pages]
            self.pages = [page for page, size in enumerate(sizes) if size == sizes[0]]
            return
        seconds = []
        for page in self.pages:
            # As browsers do: what should pass in no time takes a tenth of a second.
            shown = (self[page].info.get("duration") or 0) / 1000
            seconds.append(shown if shown > 0.01 else 0.1)
            if sum(seconds[-1:], seconds[0]) > max_seconds:
                break
        ends = np.cumsum(seconds)
        self.times, self.duration = [0.0, *ends[:-1].tolist()], float(ends[-1])
        if self.duration > max_seconds:
            raise ValueError(f"{name}: {self.duration:,.0f} seconds long, the limit is {max_seconds:,}")

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, i: int) -> Image.Image:
        return self._seek(self.pages[i]).copy()

    def _seek(self, page: int) -> Image.Image:
        try:
            self.image.seek(page)
            self.image.load()
        except Exception as error:  # PIL has many
            raise ValueError(f"{self.name}: picture {page + 1} cannot be read: {shorten(error)}") from error
        return self.image


def open_animation(source: Source, max_pixels: int, max_seconds: float) -> Animation | None:
    """The pictures of an image file of several, which libav would read one of; None for all else."""
    if isinstance(source.file, str) and "://" in source.file:
        return None
    with opened(source.file) as file:
        if not IMAGE_SIGNATURES.match(file.read(16)):
            return None
        file.seek(0)
        try:
            image = Image.open(source.file if isinstance(source.file, str) else file, formats=PAGED_FORMATS)
            if getattr(image, "n_frames", 1) < 2:
                return None
        except Exception:  # libav may know better
            return None
    try:
        check_size(image, max_pixels)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    return Animation(image, source.name, max_seconds)


def with_clips(conversation):
    """The conversation, or batch of them, with a `VideoClip` for each video that has settings of its own or is a
    list of paths."""
    if isinstance(conversation, (list, tuple)):
        return [with_clips(item) for item in conversation]
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("content"), (list, tuple)):
        return conversation
    content = []
    for item in conversation["content"]:
        if isinstance(item, Mapping) and item.get("type") == "video":
            key = next((key for key in ("video", "url", "path") if key in item), None)
            source = as_one(item[key]) if key else None
            settings = clip_settings(item, source)
            if key and (settings or isinstance(source, Frames)):
                item = {**item, key: VideoClip(source, settings)}
        content.append(item)
    return {**conversation, "content": content}


def as_one(video):
    """A list of paths as `Frames`, for it is given where one video belongs; a list of one other file is that file's."""
    if not isinstance(video, (list, tuple)) or not all(isinstance(item, (str, os.PathLike)) for item in video):
        return video
    still = len(video) == 1 and is_frame(video[0]) and not is_animated(video[0], alone=True)
    return Frames(video) if still or len(video) > 1 else video


def clip_settings(item: Mapping[str, Any], source) -> dict[str, Any]:
    """What a video of a message has for settings of its own; warns of keys that it cannot have."""
    settings = {CLIP_KEYS[key]: value for key, value in item.items() if key in CLIP_KEYS and value is not None}
    rates = [item[key] for key in RATE_KEYS if item.get(key) is not None]
    ignored = NO_CLIP_KEYS & item.keys()
    if rates and (isinstance(source, (list, tuple)) or getattr(source, "ndim", None) == 4 or is_folder(source)):
        settings["fps"] = rates[0]
    elif rates:
        ignored |= set(RATE_KEYS) & item.keys()
    if ignored:
        logger.warning_once(f"A video of a message cannot have {', '.join(sorted(ignored))} of its own; left out.")
    return settings


def read_number(value):
    """A number that is given as a text or by numpy; what is none is left as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value.tolist() if hasattr(value, "tolist") else value


def settings_of(kwargs: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The settings of a call for each of its videos."""
    shared = {name: read_number(value) if name in NUMBERS else value for name, value in kwargs.items()}
    lists = {name: value for name, value in shared.items() if name in NUMBERS and isinstance(value, (list, tuple))}
    for name, value in lists.items():
        if len(value) != count:
            raise ValueError(
                f"{name} must be a number, or a list with one for each of {count} videos, got {len(value)}"
            )
    return [{**shared, **{name: read_number(value[i]) for name, value in lists.items()}} for i in range(count)]


def with_settings(videos, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a processor with numbers for texts, and with videos that have settings of their own for lists of
    them, as transformers checks types."""
    groups = [kwargs, kwargs.get("videos_kwargs", {})]
    given = {name: read_number(group[name]) for group in groups for name in NUMBERS if group.get(name) is not None}
    lists = {name: value for name, value in given.items() if isinstance(value, (list, tuple))}
    if not given:
        return videos, kwargs
    if lists:
        videos = [] if videos is None else list_videos(videos)
        videos = [with_own(*pair) for pair in zip(videos, settings_of(lists, len(videos)), strict=True)] or None
    numbers = [{name: given.get(name, value) for name, value in group.items() if name not in lists} for group in groups]
    return videos, {**numbers[0], "videos_kwargs": numbers[1]} if groups[1] else numbers[0]


def with_own(video, settings: dict[str, Any]) -> VideoClip:
    """A video with settings that give way to its own."""
    clip = video if isinstance(video, VideoClip) else VideoClip(video, {})
    return VideoClip(clip.source, merge_settings(settings, clip.settings))


def merge_settings(settings: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Settings of a call and of a video, which go before them and before what excludes them."""
    replaced = {name for pair in RIVALS for name in pair if not own.keys().isdisjoint(pair)}
    return {key: value for key, value in settings.items() if key not in replaced} | own


def list_videos(videos) -> list:
    """Flatten any nesting of videos to one entry per video: a file as `is_file` has it, a list of frames, a 4-D array,
    or a `VideoClip`."""
    if isinstance(videos, (str, os.PathLike)):
        path = local_path(videos)
        return [(is_folder(path) and list_images(path)) or path]
    if is_frame(videos):
        return [[videos]]
    if isinstance(videos, (VideoClip, Frames)) or is_file(videos):
        return [videos]
    if isinstance(videos, (list, tuple)):
        # Pictures that move, all of them, are as many videos.
        alone = len(videos) == 1
        if videos and all(map(is_frame, videos)) and not all(is_animated(video, alone) for video in videos):
            return [list(videos)]
        return [video for item in videos for video in list_videos(item)]
    dimensions = getattr(videos, "ndim", None)
    if dimensions not in (4, 5):
        raise ValueError(f"not a video: {type(videos).__name__}{'' if dimensions is None else f' of {dimensions}-D'}")
    return [videos] if dimensions == 4 else list(videos)


def list_images(folder: str) -> list[str]:
    """The images in a folder, by name, in which numbers count as numbers: 2.png comes before 10.png."""
    names = [name for name in os.listdir(folder) if is_frame(os.path.join(folder, name))]
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)])
    return [os.path.join(folder, name) for name in names]


def is_folder(path) -> bool:
    return isinstance(path, (str, os.PathLike)) and not is_data_url(os.fspath(path)) and os.path.isdir(local_path(path))


def is_file(video) -> bool:
    return isinstance(video, (str, bytes, bytearray, memoryview)) or hasattr(video, "read")


def is_frame(item) -> bool:
    """Whether something is a picture: of a path, what the file is, or if there is none, what it is called."""
    if not isinstance(item, (str, os.PathLike)):
        return isinstance(item, Image.Image) or getattr(item, "ndim", None) == 3
    path = os.fspath(item)
    if is_data_url(path):
        return path[:11].lower() == "data:image/"
    path = local_path(path)
    if "://" not in path and os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if IMAGE_SIGNATURES.match(head):
            # A sequence in AVIF or HEIF is a video, which libav reads.
            return b"avis" not in head and b"hevc" not in head
    return (re.split("[?#]", path)[0] if "://" in path else path).lower().endswith(IMAGE_SUFFIXES)


def is_animated(item, alone: bool) -> bool:
    """Whether a picture of `is_frame` is a file of several; what is not at hand may be, if it stands alone."""
    if not isinstance(item, (str, os.PathLike)):
        return False
    path = local_path(item)
    if is_data_url(path):
        return alone
    if "://" in path:
        return alone and re.split("[?#]", path)[0].lower().endswith((".avif", ".png", ".tif", ".tiff", ".webp"))
    try:
        with Image.open(path, formats=("PNG", *PAGED_FORMATS)) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # reading it will tell
        return False


def list_metadata(metadata, count: int) -> list[VideoMetadata | None]:
    """`video_metadata` in any of the forms that the stock class takes, as one entry per video."""
    if metadata is None:
        return [None] * count
    metadata = [metadata] if isinstance(metadata, Mapping) else metadata
    metadata = [entry for item in metadata for entry in (item if isinstance(item, (list, tuple)) else [item])]
    if len(metadata) != count:
        raise ValueError(f"{count} videos, but {len(metadata)} entries in `video_metadata`")
    return [VideoMetadata(**entry) if isinstance(entry, dict) else entry for entry in metadata]


def file_metadata(file: VideoFile | Animation) -> SampledVideoMetadata:
    """Metadata of all frames of a file."""
    animated = isinstance(file, Animation)
    return SampledVideoMetadata(
        total_num_frames=len(file),
        fps=len(file) / file.duration,
        width=file.image.width if animated else file.width,
        height=file.image.height if animated else file.height,
        duration=file.duration,
        video_backend="pillow" if animated else "pyav",
        frames_indices=range(len(file)),  # as lists, these would take more memory than all else in hours of video
        frame_times=file.times,
    )


def frames_metadata(
    metadata: VideoMetadata, count: int, height: int, width: int, sampled=False
) -> SampledVideoMetadata:
    """Metadata of `count` frames at hand, which are all of a video or, if `sampled`, those that `metadata` names."""
    fps, indices = metadata.fps or 24, metadata.frames_indices
    times = getattr(metadata, "frame_times", None)
    if sampled and indices is not None and len(indices) == count:
        indices, duration = [int(i) for i in indices], count / metadata.sampled_fps
        # Frames that are numbered anew (qwen_vl_utils does so), though more of them are counted, are spaced evenly.
        anew = indices == list(range(count)) and metadata.total_num_frames > count
        times = [i * duration / count if anew else i / fps for i in indices]
    else:
        indices, duration = list(range(count)), count / (metadata.sampled_fps if sampled else fps)
        times = times or [i * duration / count for i in range(count)]
    return SampledVideoMetadata(
        total_num_frames=metadata.total_num_frames,
        fps=fps,
        width=width,
        height=height,
        duration=duration,
        video_backend=metadata.video_backend,
        frames_indices=indices,
        frame_times=times,
    )


def open_image(path: str, timeout: float) -> Source:
    if "://" in path or is_data_url(path):
        return open_source(path, timeout, keep=False)
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    return Source(path, path)


def check_size(image: Image.Image, max_pixels: float) -> None:
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} × {image.height} pixels, the limit is {max_pixels:,}")


def frame_to_tensor(frame, data_format: str | None, max_pixels: float = math.inf, timeout: float = 30) -> torch.Tensor:
    """One frame, an array, a PIL image or the path of one, as a tensor [C, H, W]; None infers the format of arrays."""
    if isinstance(frame, (str, os.PathLike)):
        path = local_path(frame)
        try:
            with contextlib.closing(open_image(path, timeout)) as source, Image.open(source.file) as image:
                check_size(image, max_pixels)
                frame = to_rgb(image)
        except Exception as error:  # PIL has many
            raise ValueError(f"{shorten(path)}: cannot be read as an image: {shorten(error)}") from error
    if isinstance(frame, Image.Image):
        frame, data_format = np.array(to_rgb(frame)), "channels_last"
    if isinstance(frame, np.ndarray) and any(stride < 0 for stride in frame.strides):
        frame = np.ascontiguousarray(frame)  # OpenCV's frame[..., ::-1]
    frame = torch.as_tensor(frame)
    data_format = data_format or infer_channel_dimension_format(frame, num_channels=(1, 3, 4))
    return frame.permute(2, 0, 1).contiguous() if data_format == "channels_last" else frame


def to_rgb(image: Image.Image) -> Image.Image:
    """An image upright and in RGB: on white, where it is transparent, and of 16 bits the upper eight."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is not known; make them 8-bit ones")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixel_factor(frames: Iterable) -> float:
    """What brings arrays to 0 to 255, which is unambiguous for booleans and for floats from 0 to 1.

    Raises:
        ValueError: what the numbers mean cannot be told.
    """
    kinds, low, high = set(), math.inf, -math.inf
    for frame in frames:
        kind = str(getattr(frame, "dtype", "uint8")).removeprefix("torch.")
        kinds.add(kind)
        if kind not in ("uint8", "bool") and not kind.startswith("uint"):
            low, high = min(float(frame.min()), low), max(float(frame.max()), high)
            if math.isnan(low):
                break
    if len(kinds) > 1 and kinds != {"uint8"}:
        raise ValueError(f"frames of one video are of several types: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind == "uint8":
        return 1.0
    if kind == "bool":
        return 255.0
    # A little more than the range may come from resizing.
    if "float" in kind and low >= -0.1 and high <= 1.1:
        return 255.0
    if "float" in kind and low >= (-25.5 if high > 25 else -0.1) and high <= 280:
        return 1.0
    if kind in ("int16", "int32", "int64", "int8") and low >= 0 and high <= 255:
        return 1.0
    found = "" if kind.startswith("uint") else f" from {low:g} to {high:g}"
    raise ValueError(
        f"frames must be uint8, bool, or floats from 0 to 1 or 0 to 255, got {kind}{found}; "
        "do_rescale=False takes them as they are"
    )


def stack_frames(frames: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Frames [1, C, H, W], `count` of them, as one tensor [count, C, H, W], without ever holding them twice."""
    video = None
    for k, frame in enumerate(frames):
        if video is None:
            video = frame.new_empty(count, *frame.shape[1:])
        video[k] = frame[0]
    return video
