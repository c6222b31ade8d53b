"""From videos to model inputs: which frames a prompt can afford, their pixels as patches, and the processor classes.

What users give is brought to one form by `video_inputs.py`; files are read by `video_reader.py`, within a plan of
`video_planner.py`. Patches, placeholders and the chat template
are those of Qwen2.5-VL; what the model makes of them is in `modeling_videonsa.py`.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessorInitKwargs
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .video_inputs import (
    Animation,
    SampledVideoMetadata,
    VideoClip,
    as_one,
    file_metadata,
    frame_to_tensor,
    frames_metadata,
    is_file,
    list_metadata,
    list_videos,
    merge_settings,
    open_animation,
    pixel_factor,
    settings_of,
    stack_frames,
    with_clips,
    with_settings,
)
from .video_planner import VideoPlan, check_range, check_request, plan_video, shorten
from .video_reader import VideoFile, frames_on_screen
from .video_source import open_source

# Numbers that are normalised and cut into patches at a time; bytes of pixels that are given up together after that,
# enough for malloc to return them.
CHUNK, PART = 2**22, 2**26

logger = logging.get_logger(__name__)


class VideoNSAProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for every form of video that `VideoNSAVideoProcessor` takes.

    In `apply_chat_template`, a video of a message may have settings of its own: `{"type": "video", "video": "a.mp4",
    "fps": 1, "start": 60, "end": 90}`; see `CLIP_KEYS`. With `return_metadata=True` there is also `timestamps`: a list
    for each video, of the seconds (float) at which its temporal patches begin.
    """

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        videos, kwargs = with_settings(videos, kwargs)
        output = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if "video_metadata" in output:
            patch = self.video_processor.temporal_patch_size
            output["timestamps"] = [metadata.sample_times[::patch] for metadata in output["video_metadata"]]
        return output

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The video processor is this module's: AutoVideoProcessor would ask to run the repository's copy of the code.
        classes = {
            "image_processor": AutoImageProcessor,
            "tokenizer": AutoTokenizer,
            "video_processor": VideoNSAVideoProcessor,
        }
        return [classes[name].from_pretrained(pretrained_model_name_or_path, **kwargs) for name in cls.get_attributes()]

    def save_pretrained(self, save_directory, *args, **kwargs):
        components = self.image_processor, self.video_processor, self
        before = [vars(component).get("auto_map") for component in components]
        files = super().save_pretrained(save_directory, *args, **kwargs)

        # The stock method leaves a reference to this class in each component, so that a second save would differ.
        for component, auto_map in zip(components, before, strict=True):
            component.auto_map = auto_map
            if auto_map is None:
                del component.auto_map
        return files

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["auto_map"] = {"AutoProcessor": reference(self)}
        output["image_processor"].pop("auto_map", None)
        return output

    def apply_chat_template(self, conversation, *args, **kwargs):
        return super().apply_chat_template(with_clips(conversation), *args, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, _, audio = super().prepare_inputs_layout(images=images, text=text, audio=audio, **kwargs)
        if videos is not None:
            videos = list_videos(videos)
            if not videos:
                raise ValueError("`videos` holds no video; without any, leave it out")
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        check_request({**kwargs, **kwargs.get("videos_kwargs", {})})
        # The stock class only counts the videos, but copies all frames to do so and counts image paths as videos.
        names = None if videos is None else ["video"] * len(videos)
        super().validate_inputs(images=images, text=text, videos=names, audio=audio, **kwargs)

    def _process_videos(self, videos, **kwargs):
        features = self.video_processor(videos, **{**kwargs, "return_metadata": True})
        patch = self.video_processor.temporal_patch_size
        features["second_per_grid_ts"] = seconds_per_patch(features["video_metadata"], patch)
        return features, [self.replace_video_token(features, video_idx=i) for i in range(len(videos))]


class VideoNSAVideoProcessorKwargs(Qwen2VLVideoProcessorInitKwargs, total=False):
    """See `VideoNSAVideoProcessor`."""

    max_frames: int | None
    max_tokens: int
    text_tokens: int
    prefer: str
    frame_tokens: int | None
    block_size: int | None
    start: int | float | None
    end: int | float | None
    on_error: str
    timeout: int | float
    max_source_pixels: int
    max_duration: int | float


class VideoNSAVideoProcessor(Qwen2VLVideoProcessor):
    """`Qwen2VLVideoProcessor` with a budget of tokens instead of frames, decoding by PyAV, and exact times.

    A video, each by itself so that a batch may mix them, is one of
    - a file: a path (`str` or `pathlib.Path`), `file://` or `http(s)://`, bytes, or a binary file object. Frames are
      sampled evenly in time, or with `do_sample_frames=False` all taken. Its metadata comes from the file.
    - frames: a list of images (PIL, array or path), a folder of images, or a 4-D array. Without `video_metadata` they
      count as already sampled at `fps`, and only `num_frames` thins them out; with it, they are sampled like a file.
    - a `VideoClip` of either.

    How many frames and how large is the matter of `plan_video`, whose arguments are settings here: `max_tokens`,
    `text_tokens`, `prefer`, `fps` or `num_frames`, `max_pixels` or `frame_tokens`, `block_size`, `start`, `end`,
    `min_frames` and `max_frames`. The budget is for each video. In a call `fps`, `num_frames`, `max_pixels` and
    `frame_tokens` are exact; as attributes, `fps` and `size` (least and most pixels per frame) are what is wanted if
    the budget allows. `plan` tells what a video comes to, `video_metadata[i].plan` what it came to.

    Args:
        on_error: "raise", or "keep" to make do with what can be decoded of damaged files, images of a folder too.
        timeout: seconds that a server may take to answer or to go on.
        max_source_pixels, max_duration: most pixels of a frame and seconds that a file may have.
        cap_pixels_per_frame: the stock rule for the size of frames, by `max_video_tokens`; then there is no budget.
    """

    fps = 4
    min_frames = 2
    max_frames = None
    size = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}  # pixels per frame; at most 64 tokens per two frames
    max_tokens = 128 * 1024
    text_tokens = 1024
    prefer = "pixels"
    frame_tokens = None
    block_size = None
    start = None
    end = None
    on_error = "raise"
    timeout = 30.0
    max_source_pixels = 2**26
    max_duration = 24 * 3600
    do_sample_frames = True
    cap_pixels_per_frame = False
    valid_kwargs = VideoNSAVideoProcessorKwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, trust_remote_code=None, **kwargs):
        # Only the Auto classes know `trust_remote_code`; here it would become a setting.
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": {"AutoVideoProcessor": reference(self)}}

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Returns `pixel_values_videos` [patches, 1176] and `video_grid_thw` [videos, 3], the patches along t, h, w.

        With `return_metadata=True` also `video_metadata`, one `SampledVideoMetadata` per video.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a video cannot be read completely, lacks what the call asks for, or exceeds the budget.
        """
        videos = list_videos(videos)
        if not videos:
            raise ValueError("no video to process")
        metadata = list_metadata(kwargs.pop("video_metadata", None), len(videos))
        return_tensors = kwargs.pop("return_tensors", None)
        return_metadata = self._setting("return_metadata", kwargs)
        settings = settings_of(kwargs, len(videos))
        features = [self._preprocess_one(*video) for video in zip(videos, metadata, settings, strict=True)]

        def join(name: str) -> torch.Tensor:
            parts = [feature[name] for feature in features]
            return torch.cat(parts) if len(parts) > 1 else parts[0]  # to concatenate one would only copy its pixels

        batch = BatchFeature({name: join(name) for name in self.model_input_names}, tensor_type=return_tensors)
        if return_metadata:
            batch["video_metadata"] = [feature["video_metadata"] for feature in features]
        return batch

    def plan(self, video, **kwargs) -> VideoPlan:
        """What the same call on this one video would take of it; of a file, only the packets are read.

        In place of a file that is not to be read at all, `video` may be its `VideoMetadata`, with width and height.
        """
        if unknown := kwargs.keys() - self.valid_kwargs.__annotations__.keys():
            raise TypeError(f"plan() got unknown settings: {shorten(', '.join(sorted(unknown)))}")
        if isinstance(video, VideoMetadata):
            metadata = frames_metadata(video, video.total_num_frames, video.height, video.width)
            return self._sample(metadata, kwargs, self._setting("do_sample_frames", kwargs))[0].plan
        (kwargs,) = settings_of(kwargs, 1)
        (video,), (metadata,) = list_videos(as_one(video)), list_metadata(kwargs.pop("video_metadata", None), 1)
        with self._opened(video, metadata, kwargs) as (_, _, sampled, _):
            return sampled.plan

    def sample_frames(self, metadata: VideoMetadata, **kwargs) -> torch.Tensor:
        """Indices [n] of the frames to take of a video with this metadata; without a size in it, frames are squares."""
        if not metadata.fps and kwargs.get("num_frames") is None and self.num_frames is None:
            raise ValueError("to sample at `fps`, `video_metadata` needs the fps of the video")
        shape = metadata.height or 224, metadata.width or 224
        return torch.tensor(self._sample(frames_metadata(metadata, metadata.total_num_frames, *shape), kwargs, True)[1])

    def _preprocess_one(self, video, metadata: VideoMetadata | None, kwargs: dict[str, Any]) -> BatchFeature:
        """Features of one entry of `list_videos`, and its metadata."""
        with self._opened(video, metadata, kwargs) as (source, kwargs, metadata, indices):
            size = {"height": metadata.plan.height, "width": metadata.plan.width}
            resample = self._setting("resample", kwargs)

            def resize(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
                # The stock class's own, past its choice of a size.
                size = SizeDict(height=height, width=width)
                return super(Qwen2VLVideoProcessor, self).resize(image=frame, size=size, resample=resample)

            if isinstance(source, VideoFile):
                patch, frame = self._setting("temporal_patch_size", kwargs), 3 * size["height"] * size["width"]
                parts = source.read_parts(indices, **size, size=-(-PART // (frame * patch)) * patch, resize=resize)
            else:
                frames = self._frames(source, indices, kwargs)
                if self._setting("do_rescale", kwargs) and not isinstance(source, Animation):
                    factor = pixel_factor(source[i] for i in indices)
                    frames = frames if factor == 1 else (frame.float() * factor for frame in frames)
                parts = [stack_frames((resize(frame[None], **size) for frame in frames), len(indices))]
        features = self._patches(parts, kwargs)
        features["video_metadata"] = metadata
        return features

    def _patches(self, parts: list[torch.Tensor], kwargs: dict[str, Any]) -> BatchFeature:
        """Stock features of sampled and resized frames, tensors [n, C, H, W] of whole patches but for the last.

        Chunk by chunk, so that floats are not held twice, and each part is taken from the list, and given up."""
        ours = {*OWN_SETTINGS, "fps", "num_frames", "min_pixels", "max_pixels", "min_frames", "max_frames"}
        kwargs = {key: value for key, value in kwargs.items() if key not in ours}
        kwargs |= {"do_sample_frames": False, "do_resize": False, "return_metadata": False}
        kwargs["input_data_format"] = "channels_first"
        patch = self._setting("temporal_patch_size", kwargs)
        patches, start, count = None, 0, sum(map(len, parts))
        while parts:
            pixels = parts.pop(0)
            for chunk in pixels.split(max(CHUNK // pixels[0].numel() // patch, 1) * patch):
                features = super().preprocess([chunk], **kwargs)
                if len(chunk) == count:
                    return features
                made, (t, h, w) = features["pixel_values_videos"], features["video_grid_thw"][0].tolist()
                if patches is None:
                    t = -(-count // patch)
                    patches, grid = made.new_empty(t * h * w, made.shape[1]), torch.tensor([[t, h, w]])
                patches[start : start + len(made)] = made
                start += len(made)
        return BatchFeature({"pixel_values_videos": patches, "video_grid_thw": grid})

    @contextlib.contextmanager
    def _opened(self, video, metadata: VideoMetadata | None, kwargs: dict[str, Any]):
        """For an entry of `list_videos`: a `VideoFile` or a sequence of frames; the kwargs with its own settings; the
        metadata of the frames to take, and their indices."""
        if isinstance(video, VideoClip):
            kwargs = merge_settings(kwargs, *settings_of(video.settings, 1))
            (video,) = list_videos(video.source)
        sample = self._setting("do_sample_frames", kwargs)
        timeout, on_error = self._setting("timeout", kwargs), self._setting("on_error", kwargs)
        limits = self._setting("max_source_pixels", kwargs), self._setting("max_duration", kwargs)
        with contextlib.ExitStack() as stack:
            if is_file(video):
                opened = open_source(video, timeout, on_error == "keep")
                stack.callback(opened.close)
                video = open_animation(opened, *limits)
                if video is not None:
                    stack.callback(video.image.close)
                else:
                    limits = {"max_pixels": limits[0], "max_seconds": limits[1]}
                    video = stack.enter_context(VideoFile(opened, on_error=on_error, timeout=timeout, **limits))
                if isinstance(video, VideoFile) or video.times:
                    try:
                        sampled = self._sample(file_metadata(video), kwargs, sample)
                    except ValueError as error:
                        raise ValueError(f"{video.name}: {error}") from error
                    yield video, kwargs, *sampled
                    return
            yield video, kwargs, *self._sampled_frames(video, metadata, kwargs, sample)

    def _sampled_frames(self, video, metadata: VideoMetadata | None, kwargs: dict[str, Any], sample: bool):
        """The same for a sequence of frames, whose metadata may be known."""
        if metadata is None:
            fps, total = float(kwargs.get("fps") or self.fps), len(video)
            sample = sample and (kwargs.get("num_frames") or self.num_frames) is not None
            metadata = VideoMetadata(total, fps=fps, frames_indices=list(range(total)))
        elif sample and metadata.total_num_frames != len(video):
            raise ValueError(
                f"`video_metadata` is of {metadata.total_num_frames} frames, the video has {len(video)}; "
                "if these are sampled already, pass do_sample_frames=False"
            )
        shape = next(self._frames(video, range(len(video)), kwargs)).shape[1:]
        metadata = frames_metadata(metadata, len(video), *shape, sampled=not sample)
        return self._sample(metadata, kwargs, sample)

    def _frames(self, video, indices: Iterable[int], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
        """Frames [C, H, W], all alike, of a list or array; with `on_error="keep"`, for images that cannot be read those
        before stand in."""
        data_format, timeout = kwargs.get("input_data_format"), self._setting("timeout", kwargs)
        limit = self._setting("max_source_pixels", kwargs)
        last, missing, problem = None, 0, None
        for i in indices:
            try:
                frame = frame_to_tensor(video[i], data_format, limit, timeout)
            except ValueError as error:
                if self._setting("on_error", kwargs) != "keep":
                    raise
                problem, frame, missing = error, last, missing + (last is None)
            if frame is None:
                continue
            if last is not None and frame.shape != last.shape:
                name = shorten(video[i]) if isinstance(video[i], (str, os.PathLike)) else f"frame {i}"
                raise ValueError(f"{name} is {tuple(frame.shape)}, those before are {tuple(last.shape)} [C, H, W]")
            last = frame
            for _ in range(missing + 1):
                yield frame
            missing = 0
        if last is None:
            raise problem or ValueError("a video without frames")
        if problem:
            logger.warning(f"{problem}; for all such images, those before stand in")

    def _sample(
        self, metadata: SampledVideoMetadata, kwargs: dict[str, Any], sample: bool
    ) -> tuple[SampledVideoMetadata, list[int]]:
        """From the metadata of all frames to that of those to take, and their indices; not to `sample` takes all."""
        times = np.asarray(metadata.frame_times)
        request = self._request(kwargs)
        check_request(request)
        duration = metadata.duration
        if not sample:  # frames of a part of a video, sampled already, keep the times that they have in the whole
            request["start"] = times[0] if request["start"] is None else request["start"]
            duration = max(times[0] + duration, np.nextafter(times[-1], np.inf))
        start, end = check_range(request["start"], request["end"], duration)
        first = int(frames_on_screen(times, np.array([start]))[0])
        part = np.arange(first, max(np.searchsorted(times, end), first + 1))
        request |= {"total_frames": len(part), "every_frame": not sample}
        shape = duration, metadata.width, metadata.height
        if self._setting("cap_pixels_per_frame", kwargs):
            # The stock rule: an even share of a number of pixels for each frame.
            request["max_tokens"] = 2**62
            frames, least = plan_video(*shape, **request).num_frames, request["min_pixels"]
            pixels = int(self._setting("max_video_tokens", kwargs) * request["factor"] ** 2 * 0.9)
            share = pixels * request["temporal_patch_size"] // frames
            request["default_pixels"] = max(min(request["default_pixels"], share), int(least * 1.05))
        plan = plan_video(*shape, **request)
        if sample:
            part = frames_on_screen(times, plan.times)
        taken = {"frame_times": times[part].tolist(), "sample_times": (plan.times if sample else times[part]).tolist()}
        if len(metadata.frames_indices) == len(times):  # of an array they may be others: it can be sampled already
            taken["frames_indices"] = [metadata.frames_indices[i] for i in part]
        return replace(metadata, plan=plan, **taken), part.tolist()

    def _request(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `plan_video` that do not depend on the video."""
        request = {name: kwargs.get(name) for name in ("fps", "num_frames", "max_pixels", "frame_tokens")}
        if request["fps"] is None and request["num_frames"] is None:
            request["num_frames"] = self.num_frames
        if request["max_pixels"] is None and request["frame_tokens"] is None:
            request["frame_tokens"] = self.frame_tokens
        size = dict(self._setting("size", kwargs))
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            raise ValueError(f"size must have `shortest_edge` and `longest_edge`, both in pixels per frame, got {size}")
        names = ("max_tokens", "text_tokens", "prefer", "block_size", "start", "end", "min_frames", "max_frames")
        return {
            **request,
            **{name: self._setting(name, kwargs) for name in (*names, "temporal_patch_size")},
            "default_fps": self.fps,
            "default_pixels": size["longest_edge"],
            "min_pixels": kwargs.get("min_pixels") or size["shortest_edge"],
            "factor": self._setting("patch_size", kwargs) * self._setting("merge_size", kwargs),
            "do_resize": self._setting("do_resize", kwargs),
        }

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(name)
        return getattr(self, name) if value is None else value


OWN_SETTINGS = (
    VideoNSAVideoProcessorKwargs.__annotations__.keys() - Qwen2VLVideoProcessorInitKwargs.__annotations__.keys()
)


def reference(component) -> str:
    """How the saved configuration of a processor names its class: "file.class"."""
    return f"{type(component).__module__.rpartition('.')[2]}.{type(component).__name__}"


def seconds_per_patch(metadata: list[SampledVideoMetadata], patch: int) -> list[float] | list[list[float]]:
    """Seconds that a temporal patch of each video spans. If frames of one are not spaced evenly, to a frame of its
    source, then for each video the seconds at which its patches begin, counted from the first, filled up by 0."""
    steps = [patch / m.sampled_fps for m in metadata]
    starts = [np.array(m.sample_times[::patch]) - m.sample_times[0] for m in metadata]
    even = [np.arange(len(start)) * step for start, step in zip(starts, steps, strict=True)]
    uneven = [np.abs(a - b).max() > 1 / m.fps + 1e-6 for a, b, m in zip(starts, even, metadata, strict=True)]
    if not any(uneven):
        return steps
    rows = [start if odd else grid for start, grid, odd in zip(starts, even, uneven, strict=True)]
    longest = max(map(len, rows))
    return [[*row.tolist(), *[0.0] * (longest - len(row))] for row in rows]


__all__ = ["VideoNSAProcessor", "VideoNSAVideoProcessor"]

VideoNSAProcessor.register_for_auto_class("AutoProcessor")
VideoNSAVideoProcessor.register_for_auto_class("AutoVideoProcessor")
