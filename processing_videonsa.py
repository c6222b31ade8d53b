"""From videos to model inputs: frame times, sampling within a frame budget, decoding, and the processor classes.

A file is read twice. Its packets, not decoded, give the time of every frame; then the sampled frames are decoded and
resized one by one, so that a video is never held at its full size. Patches, placeholders and the chat template are
those of Qwen2.5-VL; what the model makes of them is in `modeling_videonsa.py`.
"""

import math
import os
from collections import Counter, namedtuple
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.image_utils import infer_channel_dimension_format, load_image
from transformers.video_utils import VideoMetadata

# A list of such paths is the frames of one video; any other path is a video of its own.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Seconds. Matroska and FLV keep times in milliseconds, so that a duration can lack this much.
ROUNDING = 2e-3


class VideoNSAProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for every form of video that `VideoNSAVideoProcessor` takes."""

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, _, audio = super().prepare_inputs_layout(images=images, text=text, audio=audio, **kwargs)
        return images, text, None if videos is None else list_videos(videos), audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        check_sampling(**{**kwargs, **kwargs.get("videos_kwargs", {})})
        # The stock class only counts the videos, but copies all frames to do so and counts image paths as videos.
        names = None if videos is None else ["video"] * len(videos)
        super().validate_inputs(images=images, text=text, videos=names, audio=audio, **kwargs)

    def _process_videos(self, videos, **kwargs):
        features = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        patch = self.video_processor.temporal_patch_size
        features["second_per_grid_ts"] = [patch / metadata.sampled_fps for metadata in features["video_metadata"]]
        return features, [self.replace_video_token(features, video_idx=i) for i in range(len(videos))]


class VideoNSAVideoProcessor(Qwen2VLVideoProcessor):
    """`Qwen2VLVideoProcessor` with the sampling of the paper, decoding by PyAV, and exact frame times.

    A video, each by itself so that a batch may mix them, is one of
    - a file: a path (`str` or `pathlib.Path`), `file://` or `http(s)://`. It is sampled at `fps`, or `num_frames` are
      taken of it, or with `do_sample_frames=False` all frames. Its metadata comes from the file.
    - frames: a list of images (PIL, array or path) or a 4-D array. Without `video_metadata` they count as already
      sampled at `fps`, and only `num_frames` thins them out; with it, they are sampled like a file.

    In a call, `fps` and `num_frames` exclude each other, and either replaces the defaults. `cap_pixels_per_frame=True`
    makes the frame size depend on the whole video: then the stock class resizes, after all frames have been read.
    """

    fps = 4
    min_frames = 2
    max_frames = 4096  # 128K vision tokens; a longer video is sampled more sparsely
    size = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}  # pixels per frame; at most 64 tokens per two frames
    do_sample_frames = True
    cap_pixels_per_frame = False

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Returns `pixel_values_videos` [patches, 1176] and `video_grid_thw` [videos, 3], the patches along t, h, w.

        With `return_metadata=True` also `video_metadata`, one `VideoMetadata` per video.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a video cannot be read completely, or lacks what the call asks for.
        """
        videos = list_videos(videos)
        if not videos:
            raise ValueError("no video to process")
        metadata = list_metadata(kwargs.pop("video_metadata", None), len(videos))
        return_tensors = kwargs.pop("return_tensors", None)
        return_metadata = self._setting("return_metadata", kwargs)
        features = [self._preprocess_one(*video, **kwargs) for video in zip(videos, metadata, strict=True)]

        def join(name: str) -> torch.Tensor:
            parts = [feature[name] for feature in features]
            return torch.cat(parts) if len(parts) > 1 else parts[0]  # to concatenate one would only copy its pixels

        batch = BatchFeature({name: join(name) for name in self.model_input_names}, tensor_type=return_tensors)
        if return_metadata:
            batch["video_metadata"] = [feature["video_metadata"][0] for feature in features]
        return batch

    def sample_frames(self, metadata: VideoMetadata, **kwargs) -> torch.Tensor:
        """Indices [n] of the frames on screen at the times k * duration / n, k < n.

        n is `num_frames`, or duration * `fps` held between `min_frames` and `max_frames`; in either case a multiple of
        `temporal_patch_size`, unless the video has fewer frames than that.
        """
        request = self._sampling_request(**kwargs)
        total, patch = metadata.total_num_frames, request["temporal_patch_size"]
        if (count := request["num_frames"]) is not None:
            if count > total:
                raise ValueError(f"num_frames={count} is more than the {total} frames of the video")
            count = max(round(count / patch), 1) * patch
        elif metadata.fps:
            count = int((total / metadata.fps + ROUNDING) * request["fps"])
            count = min(max(count, request["min_frames"], patch), request["max_frames"])
        else:
            raise ValueError("to sample at `fps`, `video_metadata` needs the fps of the video")
        count = min(count, total) // patch * patch or total
        times = getattr(metadata, "frame_times", None)
        return torch.from_numpy(frames_on_screen(total, count, times, metadata.duration))

    def _preprocess_one(self, video, metadata: VideoMetadata | None, **kwargs) -> BatchFeature:
        """Stock features of one entry of `list_videos`."""
        request = self._sampling_request(**kwargs)
        sample = self._setting("do_sample_frames", kwargs)
        if isinstance(video, str):
            video = VideoFile(video)
            metadata = video.metadata()
        elif metadata is None:
            sample = sample and request["num_frames"] is not None
            fps, total = request["fps"] or self.fps, len(video)
            metadata = VideoMetadata(total, fps=fps, duration=total / fps, frames_indices=list(range(total)))
        elif sample and metadata.total_num_frames != len(video):
            raise ValueError(
                f"`video_metadata` is of {metadata.total_num_frames} frames, the video has {len(video)}; "
                "if these are sampled already, pass do_sample_frames=False"
            )
        indices = list(range(len(video)))
        if sample:
            indices = self.sample_frames(metadata, **request).tolist()
            metadata = select_frames(metadata, indices)

        do_resize = self._setting("do_resize", kwargs)
        if isinstance(video, (VideoFile, list)):
            if isinstance(video, VideoFile):
                frames = video.frames(indices)
            else:
                frames = (frame_to_tensor(video[i], kwargs.get("input_data_format")) for i in indices)
            if do_resize and not self._setting("cap_pixels_per_frame", kwargs):
                frames, do_resize = self._resize_frames(frames, kwargs), False
            video, kwargs["input_data_format"] = stack_frames(frames, len(indices)), "channels_first"
        elif sample:
            video = video[indices]
        # Sampled and, but for an array, resized: what is left to the stock class is the patches.
        kwargs |= {"fps": None, "num_frames": None, "do_sample_frames": False, "do_resize": do_resize}
        kwargs |= {"video_metadata": [metadata], "return_metadata": True}
        return super().preprocess([video], **kwargs)

    def _sampling_request(self, fps=None, num_frames=None, **kwargs) -> dict[str, Any]:
        """The arguments of `sample_frames` with defaults filled in, checked; one of `fps` and `num_frames` is None."""
        if fps is None and num_frames is None:
            fps, num_frames = (self.fps, None) if self.num_frames is None else (None, self.num_frames)
        names = ("min_frames", "max_frames", "temporal_patch_size")
        request = {"fps": fps, "num_frames": num_frames, **{name: self._setting(name, kwargs) for name in names}}
        check_sampling(**request)
        return request

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(name)
        return getattr(self, name) if value is None else value

    def _resize_frames(self, frames: Iterable[torch.Tensor], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
        """Resize frames [C, H, W] one at a time, to the pixels that the stock class gives for all of them at once."""
        pixels = {name: kwargs.get(name) for name in ("min_pixels", "max_pixels")}
        size = self._standardize_kwargs(size=self._setting("size", kwargs), **pixels)["size"]
        factor = self._setting("patch_size", kwargs) * self._setting("merge_size", kwargs)
        resample = self._setting("resample", kwargs)
        for frame in frames:
            yield self.resize(frame[None], size=size, resample=resample, factor=factor)[0]


@dataclass
class SampledVideoMetadata(VideoMetadata):
    """Metadata of a file. `fps` is its mean rate, from which a variable frame rate's times cannot be computed."""

    frame_times: list[float] | None = None  # seconds from the first frame of the video, one per entry of frames_indices

    @property
    def timestamps(self) -> list[float]:
        return self.frame_times


def register_qwen_vl_utils_reader() -> None:
    """Let `qwen_vl_utils.process_vision_info` decode by PyAV, in place of a function that torchvision has removed.

    It stays the choice of qwen_vl_utils to use decord or torchcodec where one is installed.
    """
    try:
        from qwen_vl_utils import vision_process
    except ImportError as error:
        raise ImportError("register_qwen_vl_utils_reader needs qwen_vl_utils: pip install qwen-vl-utils") from error

    def read_video(ele: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
        """Frames [T, 3, H, W] uint8 of ele["video"], their metadata, and the frames per second that they amount to."""
        file = VideoFile(local_path(ele["video"]))
        fps = len(file) / file.duration
        first, last, total = vision_process.calculate_video_frame_range(ele, len(file), fps)
        count = vision_process.smart_nframes(ele, total_frames=total, video_fps=fps)
        indices = torch.linspace(first, last, count).round().long().tolist()
        video = stack_frames(file.frames(indices), count)
        metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": total, "video_backend": "pyav"}
        return video, metadata, count / total * fps

    vision_process.VIDEO_READER_BACKENDS["torchvision"] = read_video


def list_videos(videos) -> list:
    """Flatten any nesting of videos to one entry per video: a path or URL (str), a list of frames, or a 4-D array."""
    if isinstance(videos, (str, os.PathLike)):
        return [local_path(videos)]
    if is_frame(videos):
        return [[videos]]
    if isinstance(videos, (list, tuple)):
        if videos and all(map(is_frame, videos)):
            return [list(videos)]
        return [video for item in videos for video in list_videos(item)]
    dimensions = getattr(videos, "ndim", None)
    if dimensions not in (4, 5):
        raise ValueError(f"not a video: {type(videos).__name__}{'' if dimensions is None else f' of {dimensions}-D'}")
    return [videos] if dimensions == 4 else list(videos)


def is_frame(item) -> bool:
    if isinstance(item, (str, os.PathLike)):
        path = os.fspath(item).lower()
        return path.endswith(IMAGE_SUFFIXES) or path.startswith("data:image/")
    return isinstance(item, Image.Image) or getattr(item, "ndim", None) == 3


def local_path(path: str | os.PathLike) -> str:
    """A path as a str; `file://` becomes a plain path, other URLs stay as they are."""
    path = os.fspath(path)
    return unquote(path.removeprefix("file://")) if path.startswith("file://") else path


def list_metadata(metadata, count: int) -> list[VideoMetadata | None]:
    """`video_metadata` in any of the forms that the stock class takes, as one entry per video."""
    if metadata is None:
        return [None] * count
    metadata = [metadata] if isinstance(metadata, Mapping) else metadata
    metadata = [entry for item in metadata for entry in (item if isinstance(item, (list, tuple)) else [item])]
    if len(metadata) != count:
        raise ValueError(f"{count} videos, but {len(metadata)} entries in `video_metadata`")
    return [VideoMetadata(**entry) if isinstance(entry, dict) else entry for entry in metadata]


def check_sampling(*, fps=None, num_frames=None, max_frames=None, temporal_patch_size=None, **_) -> None:
    """Raise ValueError for a request that no video can meet."""
    if fps is not None and num_frames is not None:
        raise ValueError(f"pass `fps` or `num_frames`, not both (got fps={fps}, num_frames={num_frames})")
    if fps is not None and not (isinstance(fps, (int, float)) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps}")
    if num_frames is not None and not (isinstance(num_frames, int) and num_frames > 0):
        raise ValueError(f"num_frames must be a positive integer, got {num_frames}")
    if max_frames is not None and temporal_patch_size is not None and max_frames < temporal_patch_size:
        raise ValueError(f"max_frames={max_frames} cannot hold the {temporal_patch_size} frames of a temporal patch")


def frames_on_screen(total: int, count: int, times: list[float] | None, duration: float | None) -> np.ndarray:
    """Indices [count] of the frames on screen at the times k * duration / count, k < count, of `total` frames.

    `times` are seconds, ascending from 0; None stands for a constant frame rate.
    """
    steps = np.arange(count)
    if times is None or np.abs(times - np.arange(total) * (duration / total)).max() < ROUNDING:
        return steps * total // count  # whole numbers: no frame is missed by the rounding of its time
    late = 1e-6  # seconds, against the rounding of floats
    return np.searchsorted(times, steps * (duration / count) + late, side="right") - 1


def select_frames(metadata: VideoMetadata, indices: list[int]) -> VideoMetadata:
    """A copy of the metadata of all frames of a video for those at `indices`."""
    chosen = {"frames_indices": indices}
    if (times := getattr(metadata, "frame_times", None)) is not None:
        chosen["frame_times"] = [times[i] for i in indices]
    return replace(metadata, **chosen)


def frame_to_tensor(frame, data_format: str | None) -> torch.Tensor:
    """One frame, an array, a PIL image or the path of one, as a tensor [C, H, W]; None infers the format of arrays."""
    if isinstance(frame, (str, os.PathLike, Image.Image)):
        image = frame if isinstance(frame, Image.Image) else local_path(frame)
        frame, data_format = np.array(load_image(image)), "channels_last"
    frame = torch.as_tensor(frame)
    data_format = data_format or infer_channel_dimension_format(frame, num_channels=(1, 3, 4))
    return frame.permute(2, 0, 1).contiguous() if data_format == "channels_last" else frame


def stack_frames(frames: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Frames [C, H, W], `count` of them, as one tensor [count, C, H, W], without ever holding them twice."""
    video = None
    for k, frame in enumerate(frames):
        if video is None:
            video = torch.empty(count, *frame.shape, dtype=frame.dtype)
        if frame.shape != video.shape[1:]:
            raise ValueError(f"frame {k} is {tuple(frame.shape)} and frame 0 is {tuple(video.shape[1:])} [C, H, W]")
        video[k] = frame
    return video


# What a packet tells about its frame: when it is shown and for how long, in ticks, and whether it is shown at all.
Packet = namedtuple("Packet", "pts duration is_keyframe is_discard")


class VideoFile:
    """The video stream of a file or URL: times read from its packets, frames decoded on demand.

    times:    float64 [frames], seconds from the first frame, ascending
    duration: seconds, until the last frame leaves the screen

    Raises FileNotFoundError, or ValueError for what cannot be read as a video or ends early.
    """

    def __init__(self, path: str):
        self.path = path
        packets, end = [], 0.0
        with open_video(path) as (container, stream):
            size = stream.width, stream.height
            tick, rate = float(stream.time_base), float(stream.guessed_rate or stream.average_rate or 24)
            # AVI has no presentation times: its packets are timed as they are stored, which is not as they are shown.
            self.in_order = "avi" in container.format.name
            declared = (container.duration or 0) / av.time_base
            for packet in container.demux():
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == stream.index and packet.size:
                    packets.append(Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
        if all(packet.pts is None for packet in packets):  # a raw stream, not in a container
            packets = [Packet(i, 1, True, False) for i in range(len(packets))]
            tick, self.in_order = 1 / rate, True
        elif end + 1 < declared:  # streams may end a little before their container does
            raise ValueError(f"{path}: truncated after {end:.1f} of {declared:.1f} s ({len(packets)} frames)")
        packets = [packet for packet in packets if packet.pts is not None]
        # A recording may start anywhere, but what is shown before its first key frame cannot be decoded.
        start = next((packet.pts for packet in packets if packet.is_keyframe), -math.inf)
        packets = sorted(packet for packet in packets if packet.pts >= start and not packet.is_discard)
        if not packets:
            raise ValueError(f"{path}: no frames in its video stream")
        self.pts = [packet.pts for packet in packets]  # in ticks
        self.times = (np.array(self.pts) - self.pts[0]) * tick
        last = packets[-1].duration * tick or (np.median(np.diff(self.times)) if len(packets) > 1 else 1 / rate)
        self.duration = float(self.times[-1] + last)
        if abs(self.duration - len(packets) / rate) < ROUNDING:
            self.duration = len(packets) / rate
        self.quarter_turns = self._quarter_turns()
        self.width, self.height = size[::-1] if self.quarter_turns % 2 else size

    def _quarter_turns(self) -> int:
        """By how many times 90° frames are to be turned counterclockwise: phones store what they film sideways."""
        with open_video(self.path) as (container, stream):
            try:
                return next((round(frame.rotation / 90) for frame in container.decode(stream)), 0)
            except av.FFmpegError:
                return 0  # reading the frames will tell

    def __len__(self) -> int:
        return len(self.pts)

    def metadata(self) -> SampledVideoMetadata:
        """Metadata of all frames."""
        return SampledVideoMetadata(
            total_num_frames=len(self),
            fps=len(self) / self.duration,
            width=self.width,
            height=self.height,
            duration=self.duration,
            video_backend="pyav",
            frames_indices=list(range(len(self))),
            frame_times=self.times.tolist(),
        )

    def frames(self, indices: list[int]) -> Iterator[torch.Tensor]:
        """Decode the frames at `indices`, which ascend and may repeat: uint8 [3, H, W], upright, all of one size."""
        wanted = Counter(indices if self.in_order else (self.pts[i] for i in indices))
        size, problem = {}, "the stream ended"
        with open_video(self.path) as (container, stream):
            try:
                for i, frame in enumerate(container.decode(stream)):
                    if repeats := wanted.pop(i if self.in_order else frame.pts, 0):
                        size = size or {"width": frame.width, "height": frame.height}
                        pixels = np.rot90(frame.to_ndarray(format="rgb24", **size), self.quarter_turns)
                        yield from [torch.from_numpy(pixels.transpose(2, 0, 1).copy())] * repeats
                    if not wanted:
                        return
            except av.FFmpegError as error:
                problem = error
        decoded = f"{len(indices) - wanted.total()} of {len(indices)}"
        raise ValueError(f"{self.path}: truncated or damaged, {decoded} frames could be decoded: {problem}")


@contextmanager
def open_video(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file or URL and choose its video stream; errors of PyAV come out as ValueErrors that name the file."""
    if "://" not in path:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such video file")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path}: the file is empty")
    try:
        with av.open(path) as container:
            # The cover of a song is a video stream too, of one picture.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams} - {"video"})
                raise ValueError(f"{path}: no video stream, only {', '.join(kinds) or 'pictures'}")
            if streams[0].codec_context is None:
                raise ValueError(f"{path}: no decoder for its video stream")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as a video: {error}") from error


__all__ = ["VideoNSAProcessor", "VideoNSAVideoProcessor", "register_qwen_vl_utils_reader"]

VideoNSAProcessor.register_for_auto_class("AutoProcessor")
VideoNSAVideoProcessor.register_for_auto_class("AutoVideoProcessor")
