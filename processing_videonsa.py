"""From videos to model inputs: which frames a prompt can afford, their pixels as patches, and the processor classes.

`video_inputs.py` brings what users give to one form. `video_planner.py` decides how many frames to take, and
`video_reader.py` reads them. Patches, placeholders and the chat template are those of Qwen2.5-VL or of Qwen3-VL.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
)
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

# Numbers that are normalised and cut into patches at a time.
CHUNK_NUMBERS = 2**22
# Bytes of pixels that are freed together after that: enough for malloc to return them to the system.
PART_BYTES = 2**26

logger = logging.get_logger(__name__)


class AnyVideo:
    """Lets a stock processor take every form of video that `VideoNSAVideoProcessor` takes.

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
        options = {"tokenizer": cls._tokenizer_options(pretrained_model_name_or_path, **kwargs)}
        return [
            classes[name].from_pretrained(pretrained_model_name_or_path, **{**options.get(name, {}), **kwargs})
            for name in cls.get_attributes()
        ]

    @classmethod
    def _tokenizer_options(cls, source, trust_remote_code=None, **kwargs) -> dict:
        # By itself AutoTokenizer reads the configuration as one of remote code. Where that must not run, or is not in
        # the folder (an adapter's), it warns of the model's type.
        config, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
        is_ours = (config.get("model_type") or "").startswith("videonsa")
        return {"config": PreTrainedConfig.from_dict(config)} if is_ours else {}

    def save_pretrained(self, save_directory, *args, **kwargs):
        components = (self.image_processor, self.video_processor, self)
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
        return features, [self.replace_video_token(features, video_idx=i) for i in range(len(videos))]


class VideoNSAProcessor(AnyVideo, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for `AnyVideo`: positions tell the model when frames are shown."""

    def _process_videos(self, videos, **kwargs):
        features, placeholders = super()._process_videos(videos, **kwargs)
        patch = self.video_processor.temporal_patch_size
        features["second_per_grid_ts"] = seconds_per_patch(features["video_metadata"], patch)
        return features, placeholders


class VideoNSAQwen3Processor(AnyVideo, Qwen3VLProcessor):
    """`Qwen3VLProcessor` for `AnyVideo`: text before each temporal patch tells the model when it is shown."""

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)
        # The longest that `max_duration` allows by default, and the signs around the patch.
        longest = f"<{VideoNSAVideoProcessor.max_duration:.1f} seconds>{self.vision_start_token}{self.vision_end_token}"
        video_processor.stamp_tokens = len(tokenizer(longest, add_special_tokens=False)["input_ids"])

    def replace_video_token(self, video_inputs, video_idx: int, **kwargs) -> str:
        """The stock text, with the frames' own times: stock would divide their indices by the mean rate."""
        metadata = video_inputs["video_metadata"][video_idx]
        # Rounded, so that times such as 0.75 s become the same text however they were computed.
        timed = replace(metadata, fps=1.0, frames_indices=[round(time, 6) for time in metadata.frame_times])
        return super().replace_video_token({**video_inputs, "video_metadata": {video_idx: timed}}, video_idx)


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


@dataclass(frozen=True)
class VideoSettings:
    """What one video is processed with: settings of the call and, for those that it leaves out, of the processor.

    `VideoNSAVideoProcessorKwargs` names what a call may give, the attributes of `VideoNSAVideoProcessor` are the
    defaults. `plan_video` explains its arguments.
    """

    # Exact wishes, arguments of `plan_video`. A processor may have `num_frames` and `frame_tokens`; those of a call,
    # and the rivals of these (`RIVALS`), replace them.
    fps: float | None
    num_frames: int | None
    max_pixels: int | None
    frame_tokens: int | None
    # Whether the call or the processor names `num_frames`; if so, frames without metadata are thinned out.
    counted: bool

    # The budget and the choice within it, arguments of `plan_video`.
    max_tokens: int
    text_tokens: int
    prefer: str
    block_size: int | None
    start: float | None
    end: float | None
    min_frames: int
    max_frames: int | None
    # What is wanted if the budget allows: frames per second, and the least and most pixels of a frame. `min_pixels`
    # of a call replaces the least.
    default_fps: float
    size: Mapping[str, int]
    min_pixels: int | None
    # False takes all frames.
    do_sample_frames: bool
    # Whether the stock rule for the size of frames replaces the budget, and the tokens that this rule divides.
    cap_pixels_per_frame: bool
    max_video_tokens: int

    # "raise", or "keep" to use what can be decoded of a damaged file, or of a folder of images.
    on_error: str
    # Seconds that a server may take to answer or to go on.
    timeout: float
    # Most pixels of a frame and most seconds of a file.
    max_source_pixels: int
    max_duration: float
    # Where arrays have their channels; None to infer it.
    input_data_format: str | None

    # Pixels and patches, as in the stock class.
    do_resize: bool
    do_rescale: bool
    resample: Any
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    # Text tokens beside a temporal patch, an argument of `plan_video`.
    stamp_tokens: int

    # What the call gives for the stock class: all but the settings that are carried out here.
    stock: dict[str, Any]

    @classmethod
    def resolve(cls, processor: Qwen2VLVideoProcessor, given: Mapping[str, Any]) -> "VideoSettings":
        """The settings of a call that gives `given`; None counts as left out. Values are not checked here."""
        values = {name: given.get(name) for name in (*CALL_ONLY, *INHERITED)}
        for name in INHERITED:
            if values[name] is None:
                values[name] = getattr(processor, name)

        values["counted"] = values["num_frames"] is not None or processor.num_frames is not None
        if values["fps"] is None and values["num_frames"] is None:
            values["num_frames"] = processor.num_frames
        if values["max_pixels"] is None and values["frame_tokens"] is None:
            values["frame_tokens"] = processor.frame_tokens

        values["default_fps"] = processor.fps
        values["stock"] = {name: value for name, value in given.items() if name not in CARRIED_OUT}
        return cls(**values)

    def plan_request(self) -> dict[str, Any]:
        """The arguments of `plan_video` that do not depend on the video.

        Raises:
            ValueError: `size` lacks one of its two numbers.
        """
        size = dict(self.size)
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            raise ValueError(f"size must have `shortest_edge` and `longest_edge`, both in pixels per frame, got {size}")
        return {
            **{name: getattr(self, name) for name in PLANNED},
            "default_pixels": size["longest_edge"],
            "min_pixels": self.min_pixels or size["shortest_edge"],
            "factor": self.patch_size * self.merge_size,
        }


# Settings that only a call has, or that have a rule of their own; the processor has a default for the others.
CALL_ONLY = ("fps", "num_frames", "max_pixels", "frame_tokens", "min_pixels", "input_data_format")
INHERITED = {field.name for field in fields(VideoSettings)} - {*CALL_ONLY, "counted", "default_fps", "stock"}
# Arguments of `plan_video` by the same names.
PLANNED = {field.name for field in fields(VideoSettings)} & inspect.signature(plan_video).parameters.keys()
# Settings that the stock class does not know, or would carry out a second time.
CARRIED_OUT = {
    *(VideoNSAVideoProcessorKwargs.__annotations__.keys() - Qwen2VLVideoProcessorInitKwargs.__annotations__.keys()),
    *("fps", "num_frames", "min_pixels", "max_pixels", "min_frames", "max_frames"),
}


class Sample(NamedTuple):
    """The frames to take of an open video."""

    source: Any  # a `VideoFile`, or a sequence of frames: `Animation`, list, array
    metadata: SampledVideoMetadata  # of these frames
    indices: list[int]  # of these frames in the source; they may repeat


class VideoNSAVideoProcessor(Qwen2VLVideoProcessor):
    """`Qwen2VLVideoProcessor` with a budget of tokens instead of frames, decoding by PyAV, and exact times.

    A batch may mix all kinds of videos:
    - a file: a path (`str` or `pathlib.Path`), `file://` or `http(s)://`, bytes, or a binary file object. Frames are
      sampled evenly in time; `do_sample_frames=False` takes all. The metadata comes from the file.
    - frames: a list of images (PIL, array or path), a folder of images, or a 4-D array. Without `video_metadata` they
      count as already sampled at `fps`, and only `num_frames` thins them out; with it, they are sampled like a file.
    - a `VideoClip` of either.

    `VideoSettings` explains the settings. A call may give each of them; the attributes are the defaults. The budget
    is for each video. `plan` tells what a video would take, `video_metadata[i].plan` what it took.
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
    stamp_tokens = 0
    valid_kwargs = VideoNSAVideoProcessorKwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, trust_remote_code=None, **kwargs):
        # Only the Auto classes know `trust_remote_code`; here it would become a setting.
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": {"AutoVideoProcessor": reference(self)}}

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Returns `pixel_values_videos` [patches, 3 · temporal_patch_size · patch_size²], and `video_grid_thw`
        [videos, 3], the patches along t, h, w.

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
        return_metadata = kwargs.get("return_metadata")
        if return_metadata is None:
            return_metadata = self.return_metadata

        given = settings_of(kwargs, len(videos))
        features = [self._preprocess_one(*video) for video in zip(videos, metadata, given, strict=True)]

        def join(name: str) -> torch.Tensor:
            parts = [feature[name] for feature in features]
            # To concatenate a single part would only copy its pixels.
            return torch.cat(parts) if len(parts) > 1 else parts[0]

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
            settings = VideoSettings.resolve(self, kwargs)
            metadata = frames_metadata(video, video.total_num_frames, video.height, video.width)
            return choose_frames(metadata, settings, settings.do_sample_frames)[0].plan

        (given,) = settings_of(kwargs, 1)
        (video,) = list_videos(as_one(video))
        (metadata,) = list_metadata(given.pop("video_metadata", None), 1)
        video, settings = self._resolve(video, given)
        with open_sample(video, metadata, settings) as sample:
            return sample.metadata.plan

    def sample_frames(self, metadata: VideoMetadata, **kwargs) -> torch.Tensor:
        """Indices [n] of the frames to take of a video with this metadata; without a size in it, frames are squares."""
        settings = VideoSettings.resolve(self, kwargs)
        if not metadata.fps and not settings.counted:
            raise ValueError("to sample at `fps`, `video_metadata` needs the fps of the video")
        height = metadata.height or 224
        width = metadata.width or 224
        metadata = frames_metadata(metadata, metadata.total_num_frames, height, width)
        _, indices = choose_frames(metadata, settings, sample=True)
        return torch.tensor(indices)

    def _resolve(self, video, given: dict[str, Any]) -> tuple[Any, VideoSettings]:
        """An entry of `list_videos` without its own settings, and the settings that hold for it."""
        if isinstance(video, VideoClip):
            (own,) = settings_of(video.settings, 1)
            given = merge_settings(given, own)
            (video,) = list_videos(video.source)
        return video, VideoSettings.resolve(self, given)

    def _preprocess_one(self, video, metadata: VideoMetadata | None, given: dict[str, Any]) -> BatchFeature:
        """Features of one entry of `list_videos`, and the metadata of its frames."""
        video, settings = self._resolve(video, given)
        with open_sample(video, metadata, settings) as sample:
            parts = self._read(sample, settings)
        features = self._patches(parts, settings)
        features["video_metadata"] = sample.metadata
        return features

    def _read(self, sample: Sample, settings: VideoSettings) -> list[torch.Tensor]:
        """The frames of a sample, resized: tensors [n, C, H, W] of whole temporal patches, except for the last."""
        height = sample.metadata.plan.height
        width = sample.metadata.plan.width

        def resize(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
            # The method of the base class: that of the stock class would choose a size.
            size = SizeDict(height=height, width=width)
            return super(Qwen2VLVideoProcessor, self).resize(image=frame, size=size, resample=settings.resample)

        if isinstance(sample.source, VideoFile):
            patch_bytes = 3 * height * width * settings.temporal_patch_size
            part_frames = math.ceil(PART_BYTES / patch_bytes) * settings.temporal_patch_size
            return sample.source.read_parts(sample.indices, height, width, part_frames, resize)

        frames = read_frames(sample.source, sample.indices, settings)
        if settings.do_rescale and not isinstance(sample.source, Animation):
            factor = pixel_factor(sample.source[i] for i in sample.indices)
            if factor != 1:
                frames = (frame.float() * factor for frame in frames)
        resized = (resize(frame[None], height, width) for frame in frames)
        return [stack_frames(resized, len(sample.indices))]

    def _patches(self, parts: list[torch.Tensor], settings: VideoSettings) -> BatchFeature:
        """Stock features of frames from `_read`.

        Takes each part from the list and frees it once its floats are made. Works in chunks, so that no video's
        floats are held twice.
        """
        options = {**settings.stock, "do_sample_frames": False, "do_resize": False, "return_metadata": False}
        options["input_data_format"] = "channels_first"
        patch = settings.temporal_patch_size
        count = sum(map(len, parts))
        patches = None
        start = 0
        while parts:
            pixels = parts.pop(0)
            chunk_patches = max(CHUNK_NUMBERS // pixels[0].numel() // patch, 1)
            for chunk in pixels.split(chunk_patches * patch):
                features = super().preprocess([chunk], **options)
                if len(chunk) == count:
                    return features

                made = features["pixel_values_videos"]
                _, height, width = features["video_grid_thw"][0].tolist()
                if patches is None:
                    time = math.ceil(count / patch)
                    patches = made.new_empty(time * height * width, made.shape[1])
                    grid = torch.tensor([[time, height, width]])
                patches[start : start + len(made)] = made
                start += len(made)
        return BatchFeature({"pixel_values_videos": patches, "video_grid_thw": grid})


@contextlib.contextmanager
def open_sample(video, metadata: VideoMetadata | None, settings: VideoSettings) -> Iterator[Sample]:
    """The frames to take of an entry of `list_videos` that is no `VideoClip`; its file is open in the `with` block."""
    if not is_file(video):
        yield sample_frames_given(video, metadata, settings)
        return

    with open_file(video, settings) as file:
        if isinstance(file, Animation) and not file.times:
            sample = sample_frames_given(file, metadata, settings)
        else:
            try:
                sample = Sample(file, *choose_frames(file_metadata(file), settings, settings.do_sample_frames))
            except ValueError as error:
                raise ValueError(f"{file.name}: {error}") from error
        yield sample


@contextlib.contextmanager
def open_file(video, settings: VideoSettings) -> Iterator[VideoFile | Animation]:
    """Open a file in one of the forms of `is_file`."""
    with contextlib.closing(open_source(video, settings.timeout, settings.on_error == "keep")) as source:
        animation = open_animation(source, settings.max_source_pixels, settings.max_duration)
        if animation is not None:
            with contextlib.closing(animation.image):
                yield animation
            return

        with VideoFile(
            source,
            on_error=settings.on_error,
            timeout=settings.timeout,
            max_pixels=settings.max_source_pixels,
            max_seconds=settings.max_duration,
        ) as file:
            yield file


def sample_frames_given(video, metadata: VideoMetadata | None, settings: VideoSettings) -> Sample:
    """What to take of a sequence of frames, whose metadata may be known."""
    sample = settings.do_sample_frames
    if metadata is None:
        # The frames count as sampled at `fps`; only a number of frames thins them out.
        sample = sample and settings.counted
        fps = float(settings.fps or settings.default_fps)
        metadata = VideoMetadata(len(video), fps=fps, frames_indices=list(range(len(video))))
    elif sample and metadata.total_num_frames != len(video):
        raise ValueError(
            f"`video_metadata` is of {metadata.total_num_frames} frames, the video has {len(video)}; "
            "if these are sampled already, pass do_sample_frames=False"
        )

    first = next(read_frames(video, range(len(video)), settings))
    metadata = frames_metadata(metadata, len(video), *first.shape[1:], sampled=not sample)
    return Sample(video, *choose_frames(metadata, settings, sample))


def read_frames(video, indices: Iterable[int], settings: VideoSettings) -> Iterator[torch.Tensor]:
    """Frames [C, H, W], all of one shape, of a list or array.

    With `on_error="keep"`, the frame before stands in for an image that cannot be read, and the first good one for
    those before it.
    """
    last = None
    missing = 0  # frames that wait for the first good one
    problem = None
    for i in indices:
        try:
            frame = frame_to_tensor(video[i], settings.input_data_format, settings.max_source_pixels, settings.timeout)
        except ValueError as error:
            if settings.on_error != "keep":
                raise
            problem = error
            if last is None:
                missing += 1
                continue
            frame = last

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


def choose_frames(
    metadata: SampledVideoMetadata, settings: VideoSettings, sample: bool
) -> tuple[SampledVideoMetadata, list[int]]:
    """From the metadata of all frames of a video to that of the frames to take, and their indices.

    Without `sample`, these are all frames from `start` to `end`.
    """
    times = np.asarray(metadata.frame_times)
    request = settings.plan_request()
    check_request(request)

    duration = metadata.duration
    if not sample:
        # Frames that were sampled from a part of a video keep the times that they have in the whole.
        if request["start"] is None:
            request["start"] = times[0]
        duration = max(times[0] + duration, np.nextafter(times[-1], np.inf))
    start, end = check_range(request["start"], request["end"], duration)

    first = int(frames_on_screen(times, np.array([start]))[0])
    part = np.arange(first, max(np.searchsorted(times, end), first + 1))
    request |= {"total_frames": len(part), "every_frame": not sample}
    shape = duration, metadata.width, metadata.height
    if settings.cap_pixels_per_frame:
        # The stock rule: no budget, but an even share of a number of pixels for each frame.
        request["max_tokens"] = 2**62
        frames = plan_video(*shape, **request).num_frames
        pixels = int(settings.max_video_tokens * request["factor"] ** 2 * 0.9)
        share = pixels * settings.temporal_patch_size // frames
        least = int(request["min_pixels"] * 1.05)
        request["default_pixels"] = max(min(request["default_pixels"], share), least)
    plan = plan_video(*shape, **request)

    if sample:
        part = frames_on_screen(times, plan.times)
        sample_times = plan.times
    else:
        sample_times = times[part]
    taken = {"frame_times": times[part].tolist(), "sample_times": sample_times.tolist()}
    # Of an array that was sampled before, these may be the indices of other frames.
    if len(metadata.frames_indices) == len(times):
        taken["frames_indices"] = [metadata.frames_indices[i] for i in part]
    return replace(metadata, plan=plan, **taken), part.tolist()


def reference(component) -> str:
    """How the saved configuration of a processor names its class: "file.class"."""
    return f"{type(component).__module__.rpartition('.')[2]}.{type(component).__name__}"


def seconds_per_patch(metadata: list[SampledVideoMetadata], patch: int) -> list[float] | list[list[float]]:
    """Seconds that a temporal patch of each video spans, if the frames of all videos are evenly spaced.

    Frames are evenly spaced if they are off by no more than one frame of their source. Otherwise: for each video, the
    seconds from its first frame at which its patches begin, padded with 0.
    """
    spans = [patch / m.sampled_fps for m in metadata]
    rows = []
    uneven = False
    for m, span in zip(metadata, spans, strict=True):
        starts = np.array(m.sample_times[::patch]) - m.sample_times[0]
        even = np.arange(len(starts)) * span
        if np.abs(starts - even).max() > 1 / m.fps + 1e-6:
            uneven = True
            rows.append(starts)
        else:
            rows.append(even)
    if not uneven:
        return spans

    longest = max(map(len, rows))
    return [[*row.tolist(), *[0.0] * (longest - len(row))] for row in rows]


__all__ = ["VideoNSAProcessor", "VideoNSAQwen3Processor", "VideoNSAVideoProcessor"]

VideoNSAProcessor.register_for_auto_class("AutoProcessor")
VideoNSAQwen3Processor.register_for_auto_class("AutoProcessor")
VideoNSAVideoProcessor.register_for_auto_class("AutoVideoProcessor")
