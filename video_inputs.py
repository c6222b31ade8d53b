"""Brings videos, their frames, their settings and their metadata from all forms that users give to one.

`processing_videonsa.py` makes model inputs of the result. This file tells video files from images, and opens images;
`video_reader.py` reads video files.
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

# Suffixes of still images, for addresses: a file on disk is known by its first bytes.
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
# Keys that a video of a message may have, and the settings that they are; the last three are those of qwen_vl_utils.
CLIP_KEYS = {
    **{key: key for key in ("fps", "num_frames", "max_pixels", "frame_tokens", "max_tokens", "prefer", "start", "end")},
    **{key: key for key in ("min_frames", "max_frames", "min_pixels", "text_tokens", "block_size", "on_error")},
    "nframes": "num_frames",
    "video_start": "start",
    "video_end": "end",
}
# Keys that a video of a message may not have.
NO_CLIP_KEYS = {"total_pixels", "resized_height", "resized_width", "timeout", "max_source_pixels", "max_duration"}
# Keys for the rate of a list of frames, the first one given counts. In qwen_vl_utils the second is the source's rate.
RATE_KEYS = ("sample_fps", "raw_fps")
# Settings that are numbers. They may be strings; in a call they may be lists with one number for each video.
NUMBERS = (*COUNTS, "text_tokens", "fps", "start", "end")

logger = logging.get_logger(__name__)


class VideoClip:
    """A video with settings of its own, which override those of the call: `VideoClip("a.mp4", {"start": 60})`.

    No dataclass: transformers 5.24 makes dictionaries of the dataclasses in a message.
    """

    def __init__(self, source: Any, settings: dict[str, Any]):
        self.source = source
        self.settings = settings


@dataclass
class SampledVideoMetadata(VideoMetadata):
    """Metadata of the frames taken of a video, or of all frames before sampling.

    `fps` is the mean rate of the video. Times are seconds from the first frame of the video.
    """

    frame_times: list[float] | None = None  # when each frame taken begins
    sample_times: list[float] | None = None  # the times sampled: when each frame taken was to be on screen
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
    """The pictures of an animated WebP or of a TIFF of several pages, each decoded when it is read.

    Attributes:
        name: what errors call the file.
        times: seconds from the first picture at which each begins; None for TIFF, which states none.
        duration: seconds; None for TIFF.
    """

    def __init__(self, image: Image.Image, name: str, max_seconds: float):
        self.image = image
        self.name = name
        self.times = None
        self.duration = None
        self.pages = range(image.n_frames)
        if image.format == "TIFF":
            # Pages of other sizes are previews or masks.
            sizes = [self._seek(page).size for page in self.pages]
            self.pages = [page for page, size in enumerate(sizes) if size == sizes[0]]
            return

        seconds = []
        for page in self.pages:
            # Browsers show a picture without a duration for a tenth of a second.
            shown = (self[page].info.get("duration") or 0) / 1000
            seconds.append(shown if shown > 0.01 else 0.1)
            if sum(seconds[-1:], seconds[0]) > max_seconds:
                break
        ends = np.cumsum(seconds)
        self.times = [0.0, *ends[:-1].tolist()]
        self.duration = float(ends[-1])
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
        except Exception as error:
            # PIL raises many kinds of errors.
            raise ValueError(f"{self.name}: picture {page + 1} cannot be read: {shorten(error)}") from error
        return self.image


def open_animation(source: Source, max_pixels: int, max_seconds: float) -> Animation | None:
    """All pictures of an image file with several. libav would read only one. None for any other file."""
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
        except Exception:
            # Whatever PIL raises, libav may be able to read the file.
            return None

    try:
        check_size(image, max_pixels)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    return Animation(image, source.name, max_seconds)


def with_clips(conversation):
    """The conversation, or batch of conversations, with a `VideoClip` for each video that needs one.

    These are videos with settings of their own, and lists of paths.
    """
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
    """A list of paths, given in place of one video, as `Frames`; anything else as it is.

    A list of one path is the frames of a video only if the path is a still image.
    """
    if not isinstance(video, (list, tuple)) or not all(isinstance(item, (str, os.PathLike)) for item in video):
        return video
    if len(video) == 1:
        still = is_frame(video[0]) and not is_animated(video[0], alone=True)
        return Frames(video) if still else video
    return Frames(video) if video else video


def clip_settings(item: Mapping[str, Any], source) -> dict[str, Any]:
    """The settings of a video of a message; warns of keys that it may not have."""
    settings = {CLIP_KEYS[key]: value for key, value in item.items() if key in CLIP_KEYS and value is not None}
    rates = [item[key] for key in RATE_KEYS if item.get(key) is not None]
    ignored = NO_CLIP_KEYS & item.keys()
    frames = isinstance(source, (list, tuple)) or getattr(source, "ndim", None) == 4 or is_folder(source)
    if rates and frames:
        settings["fps"] = rates[0]
    elif rates:
        ignored |= set(RATE_KEYS) & item.keys()
    if ignored:
        logger.warning_once(f"A video of a message cannot have {', '.join(sorted(ignored))} of its own; left out.")
    return settings


def read_number(value):
    """A number from a string or from numpy; any other value as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value.tolist() if hasattr(value, "tolist") else value


def settings_of(kwargs: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The settings of a call for each of its `count` videos; lists give one number to each."""
    shared = {name: read_number(value) if name in NUMBERS else value for name, value in kwargs.items()}
    lists = {name: value for name, value in shared.items() if name in NUMBERS and isinstance(value, (list, tuple))}
    for name, value in lists.items():
        if len(value) != count:
            raise ValueError(
                f"{name} must be a number, or a list with one for each of {count} videos, got {len(value)}"
            )
    return [{**shared, **{name: read_number(value[i]) for name, value in lists.items()}} for i in range(count)]


def with_settings(videos, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The videos and keyword arguments of a processor in a form whose types transformers accepts.

    Strings become numbers. Lists of numbers become settings of the videos, each a `VideoClip`.
    """
    groups = [kwargs, kwargs.get("videos_kwargs", {})]
    given = {name: read_number(group[name]) for group in groups for name in NUMBERS if group.get(name) is not None}
    lists = {name: value for name, value in given.items() if isinstance(value, (list, tuple))}
    if not given:
        return videos, kwargs

    if lists:
        videos = [] if videos is None else list_videos(videos)
        videos = [with_own(*pair) for pair in zip(videos, settings_of(lists, len(videos)), strict=True)] or None
    kwargs, videos_kwargs = (
        {name: given.get(name, value) for name, value in group.items() if name not in lists} for group in groups
    )
    if groups[1]:
        kwargs["videos_kwargs"] = videos_kwargs
    return videos, kwargs


def with_own(video, settings: dict[str, Any]) -> VideoClip:
    """A video with `settings`, which its own override."""
    clip = video if isinstance(video, VideoClip) else VideoClip(video, {})
    return VideoClip(clip.source, merge_settings(settings, clip.settings))


def merge_settings(settings: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The settings of a call, overridden by those of a video: each replaces its namesake and its rival (`RIVALS`)."""
    replaced = {name for pair in RIVALS for name in pair if not own.keys().isdisjoint(pair)}
    return {key: value for key, value in settings.items() if key not in replaced} | own


def list_videos(videos) -> list:
    """Flatten any nesting of videos to one entry per video.

    An entry is a file (see `is_file`), a list of frames, a 4-D array, or a `VideoClip`.
    """
    if isinstance(videos, (str, os.PathLike)):
        path = local_path(videos)
        images = list_images(path) if is_folder(path) else []
        return [images or path]
    if is_frame(videos):
        return [[videos]]
    if isinstance(videos, (VideoClip, Frames)) or is_file(videos):
        return [videos]
    if isinstance(videos, (list, tuple)):
        # Images that are all animated are one video each.
        alone = len(videos) == 1
        if videos and all(map(is_frame, videos)) and not all(is_animated(video, alone) for video in videos):
            return [list(videos)]
        return [video for item in videos for video in list_videos(item)]

    dimensions = getattr(videos, "ndim", None)
    if dimensions not in (4, 5):
        of = "" if dimensions is None else f" of {dimensions}-D"
        raise ValueError(f"not a video: {type(videos).__name__}{of}")
    return [videos] if dimensions == 4 else list(videos)


def list_images(folder: str) -> list[str]:
    """The images in a folder, sorted by name; numbers in names sort as numbers: 2.png comes before 10.png."""
    names = [name for name in os.listdir(folder) if is_frame(os.path.join(folder, name))]
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)])
    return [os.path.join(folder, name) for name in names]


def is_folder(path) -> bool:
    return isinstance(path, (str, os.PathLike)) and not is_data_url(os.fspath(path)) and os.path.isdir(local_path(path))


def is_file(video) -> bool:
    return isinstance(video, (str, bytes, bytearray, memoryview)) or hasattr(video, "read")


def is_frame(item) -> bool:
    """Whether something is an image. A path is judged by the file's content or, if no such file exists, by its name."""
    if not isinstance(item, (str, os.PathLike)):
        return isinstance(item, Image.Image) or getattr(item, "ndim", None) == 3
    path = os.fspath(item)
    if is_data_url(path):
        return path[:11].lower() == "data:image/"

    path = local_path(path)
    remote = "://" in path
    if not remote and os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(64)
        if IMAGE_SIGNATURES.match(head):
            # A sequence in AVIF or HEIF is a video, which libav reads.
            return b"avis" not in head and b"hevc" not in head
    name = re.split("[?#]", path)[0] if remote else path
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_animated(item, alone: bool) -> bool:
    """Whether an image, in the sense of `is_frame`, is a file that holds several.

    An image on a server or in a `data:` URL is not opened here. It counts as animated if it is `alone` in its list.
    """
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
    except Exception:
        # Reading the image will raise a clear error.
        return False


def list_metadata(metadata, count: int) -> list[VideoMetadata | None]:
    """`video_metadata` in any of the forms that the stock class takes, as one entry per video."""
    if metadata is None:
        return [None] * count
    if isinstance(metadata, Mapping):
        metadata = [metadata]
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
        # A list would take more memory than anything else in hours of video.
        frames_indices=range(len(file)),
        frame_times=file.times,
    )


def frames_metadata(
    metadata: VideoMetadata, count: int, height: int, width: int, sampled=False
) -> SampledVideoMetadata:
    """Metadata of `count` frames at hand: all frames of a video or, if `sampled`, those that `metadata` names."""
    fps = metadata.fps or 24
    indices = metadata.frames_indices
    duration = count / (metadata.sampled_fps if sampled else fps)
    even = [i * duration / count for i in range(count)]
    if sampled and indices is not None and len(indices) == count:
        indices = [int(i) for i in indices]
        # qwen_vl_utils numbers sampled frames from 0 on, but counts all frames of the video. These are spaced evenly.
        renumbered = indices == list(range(count)) and metadata.total_num_frames > count
        times = even if renumbered else [i / fps for i in indices]
    else:
        indices = list(range(count))
        times = getattr(metadata, "frame_times", None) or even
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
        except Exception as error:
            # PIL raises many kinds of errors.
            raise ValueError(f"{shorten(path)}: cannot be read as an image: {shorten(error)}") from error
    if isinstance(frame, Image.Image):
        frame = np.array(to_rgb(frame))
        data_format = "channels_last"
    if isinstance(frame, np.ndarray) and any(stride < 0 for stride in frame.strides):
        # torch takes no negative strides, which OpenCV's frame[..., ::-1] has.
        frame = np.ascontiguousarray(frame)
    frame = torch.as_tensor(frame)
    data_format = data_format or infer_channel_dimension_format(frame, num_channels=(1, 3, 4))
    return frame.permute(2, 0, 1).contiguous() if data_format == "channels_last" else frame


def to_rgb(image: Image.Image) -> Image.Image:
    """An image upright and in RGB, of the upper 8 bits if it has 16. Transparent pixels become white."""
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
    """The factor that scales arrays to 0 to 255: 255 for booleans and for floats from 0 to 1, or else 1.

    Raises:
        ValueError: frames are of several types, or of a type or range whose meaning is not known.
    """
    kinds = set()
    low, high = math.inf, -math.inf
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
    # Resizing may have exceeded the range a little.
    if "float" in kind and low >= -0.1 and high <= 1.1:
        return 255.0
    least = -25.5 if high > 25 else -0.1
    if "float" in kind and low >= least and high <= 280:
        return 1.0
    if kind in ("int16", "int32", "int64", "int8") and low >= 0 and high <= 255:
        return 1.0
    found = "" if kind.startswith("uint") else f" from {low:g} to {high:g}"
    raise ValueError(
        f"frames must be uint8, bool, or floats from 0 to 1 or 0 to 255, got {kind}{found}; "
        "do_rescale=False takes them as they are"
    )


def stack_frames(frames: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """`count` frames [1, C, H, W] as one tensor [count, C, H, W]. No frame is held twice for long."""
    video = None
    for k, frame in enumerate(frames):
        if video is None:
            video = frame.new_empty(count, *frame.shape[1:])
        video[k] = frame[0]
    return video
