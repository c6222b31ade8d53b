"""The forms in which users give videos, their frames and their metadata, each brought to one form.

`processing_videonsa.py` turns that into model inputs. Here, files are only told from frames; `video_reader.py` reads
them.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import infer_channel_dimension_format, load_image
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .video_planner import VideoPlan
from .video_reader import VideoFile
from .video_source import local_path

# A list of such paths is the frames of one video, as is a folder of them; any other path is a video of its own.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Keys that a video of a conversation may have of its own, by their names in qwen_vl_utils too; then those it may not.
CLIP_KEYS = {
    **{key: key for key in ("fps", "num_frames", "max_pixels", "frame_tokens", "max_tokens", "prefer", "start", "end")},
    **{key: key for key in ("min_frames", "max_frames", "min_pixels", "text_tokens", "block_size", "on_error")},
    "nframes": "num_frames",
    "video_start": "start",
    "video_end": "end",
}
NO_CLIP_KEYS = {"total_pixels", "resized_height", "resized_width", "timeout", "max_source_pixels", "max_duration"}

logger = logging.get_logger(__name__)


@dataclass
class VideoClip:
    """A video with settings of its own, which go before those of the call: `VideoClip("a.mp4", {"start": 60})`."""

    source: Any
    settings: dict[str, Any]


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


def with_clips(conversation):
    """The conversation, or batch of them, with a `VideoClip` for each video that has settings of its own."""
    if isinstance(conversation, (list, tuple)):
        return [with_clips(item) for item in conversation]
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("content"), (list, tuple)):
        return conversation
    content = []
    for item in conversation["content"]:
        if isinstance(item, Mapping) and item.get("type") == "video":
            settings = {CLIP_KEYS[key]: value for key, value in item.items() if key in CLIP_KEYS and value is not None}
            if ignored := sorted(NO_CLIP_KEYS & item.keys()):
                logger.warning_once(f"A video of a message cannot have {', '.join(ignored)} of its own; left out.")
            key = next((key for key in ("video", "url", "path") if key in item), None)
            if settings and key:
                item = {**item, key: VideoClip(item[key], settings)}
        content.append(item)
    return {**conversation, "content": content}


def list_videos(videos) -> list:
    """Flatten any nesting of videos to one entry per video: a file as `is_file` has it, a list of frames, a 4-D array,
    or a `VideoClip`."""
    if isinstance(videos, (str, os.PathLike)):
        path = local_path(videos)
        return [(os.path.isdir(path) and list_images(path)) or path]
    if is_frame(videos):
        return [[videos]]
    if isinstance(videos, VideoClip) or is_file(videos):
        return [videos]
    if isinstance(videos, (list, tuple)):
        if videos and all(map(is_frame, videos)):
            return [list(videos)]
        return [video for item in videos for video in list_videos(item)]
    dimensions = getattr(videos, "ndim", None)
    if dimensions not in (4, 5):
        raise ValueError(f"not a video: {type(videos).__name__}{'' if dimensions is None else f' of {dimensions}-D'}")
    return [videos] if dimensions == 4 else list(videos)


def list_images(folder: str) -> list[str]:
    """The images in a folder, by name, in which numbers count as numbers: 2.png comes before 10.png."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)])
    return [os.path.join(folder, name) for name in names]


def is_file(video) -> bool:
    return isinstance(video, (str, bytes, bytearray, memoryview)) or hasattr(video, "read")


def is_frame(item) -> bool:
    if isinstance(item, (str, os.PathLike)):
        path = os.fspath(item).lower()
        return path.endswith(IMAGE_SUFFIXES) or path.startswith("data:image/")
    return isinstance(item, Image.Image) or getattr(item, "ndim", None) == 3


def list_metadata(metadata, count: int) -> list[VideoMetadata | None]:
    """`video_metadata` in any of the forms that the stock class takes, as one entry per video."""
    if metadata is None:
        return [None] * count
    metadata = [metadata] if isinstance(metadata, Mapping) else metadata
    metadata = [entry for item in metadata for entry in (item if isinstance(item, (list, tuple)) else [item])]
    if len(metadata) != count:
        raise ValueError(f"{count} videos, but {len(metadata)} entries in `video_metadata`")
    return [VideoMetadata(**entry) if isinstance(entry, dict) else entry for entry in metadata]


def file_metadata(file: VideoFile) -> SampledVideoMetadata:
    """Metadata of all frames of a file."""
    return SampledVideoMetadata(
        total_num_frames=len(file),
        fps=len(file) / file.duration,
        width=file.width,
        height=file.height,
        duration=file.duration,
        video_backend="pyav",
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
        indices = [int(i) for i in indices]
        times, duration = [i / fps for i in indices], count / metadata.sampled_fps
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


def frame_to_tensor(frame, data_format: str | None, max_pixels: float = math.inf) -> torch.Tensor:
    """One frame, an array, a PIL image or the path of one, as a tensor [C, H, W]; None infers the format of arrays."""
    if isinstance(frame, (str, os.PathLike)):
        path = local_path(frame)
        try:
            image = Image.open(path) if os.path.isfile(path) else load_image(path)
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} × {image.height} pixels, the limit is {max_pixels:,}")
            frame = load_image(image)
        except Exception as error:  # PIL and httpx have many
            raise ValueError(f"{path[:200]}: cannot be read as an image: {error}") from error
    if isinstance(frame, Image.Image):
        frame, data_format = np.array(load_image(frame)), "channels_last"
    frame = torch.as_tensor(frame)
    data_format = data_format or infer_channel_dimension_format(frame, num_channels=(1, 3, 4))
    return frame.permute(2, 0, 1).contiguous() if data_format == "channels_last" else frame


def stack_frames(frames: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Frames [1, C, H, W], `count` of them, as one tensor [count, C, H, W], without ever holding them twice."""
    video = None
    for k, frame in enumerate(frames):
        if video is None:
            video = frame.new_empty(count, *frame.shape[1:])
        video[k] = frame[0]
    return video
