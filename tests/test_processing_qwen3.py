"""The processor of Qwen3-VL: stock tokens and pixels for the same frames, which tell their own times."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata
from videos import chat, decode, encode, process

from lib.conversion import load_processor
from videonsa.processing_videonsa import VideoNSAQwen3Processor


@pytest.fixture(scope="module")
def stock(qwen3_checkpoint):
    return Qwen3VLProcessor.from_pretrained(qwen3_checkpoint)


@pytest.fixture(scope="module")
def ours(qwen3_checkpoint):
    return load_processor(qwen3_checkpoint)


def shown_times(processor, inputs) -> list[float]:
    return [float(time) for time in re.findall(r"<([\d.]+) seconds>", processor.decode(inputs["input_ids"][0]))]


def assert_same_inputs(stock, ours, videos, metadata, images=None):
    """Both make the same inputs of sampled frames; ours tells when patches begin, too."""
    media = [{"type": "image"}] * len(images or ()) + [{"type": "video"}] * len(videos)
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": "What happens?"}]}]
    text = stock.apply_chat_template(messages, tokenize=False)
    # The stock class is given lists of its own: it lengthens them.
    expected, actual = (
        processor(
            text=[text],
            images=images,
            videos=videos,
            video_metadata=[VideoMetadata(**{**m, "frames_indices": list(m["frames_indices"])}) for m in metadata],
            do_sample_frames=False,
            do_resize=False,
            return_tensors="pt",
            **options,
        )
        for processor, options in ((stock, {}), (ours, {"return_metadata": True}))
    )
    assert [metadata.frames_indices for metadata in actual.pop("video_metadata")] == [
        m["frames_indices"] for m in metadata
    ]
    del actual["timestamps"]
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize(
    ("fps", "step", "count"), [(30, 15, 8), (29.97, 15, 7), (10, 5, 4), (25, 6, 5), (24, 1, 1), (1, 1800, 6)]
)
def test_the_same_frames_give_the_stock_inputs(stock, ours, fps, step, count):
    """The first case has times half-way between tenths of a second; the last one begins its patches hours apart."""
    frames = np.random.default_rng(0).integers(0, 256, (count, 64, 96, 3), np.uint8)
    sampled = {"total_num_frames": step * count, "fps": fps, "frames_indices": [i * step for i in range(count)]}
    assert_same_inputs(stock, ours, [frames], [sampled])


def test_images_and_videos_of_one_prompt_are_stock(stock, ours):
    videos = [np.full((count, 64, 64, 3), 90, np.uint8) for count in (4, 3)]
    metadata = [
        {"total_num_frames": 40, "fps": 8, "frames_indices": [0, 4, 8, 12]},
        {"total_num_frames": 90, "fps": 30, "frames_indices": [10, 25, 40]},
    ]
    assert_same_inputs(stock, ours, videos, metadata, images=[Image.new("RGB", (64, 96), "red")])


@pytest.mark.parametrize("fps", [2, 3, 4])
def test_a_file_gives_the_stock_tokens_of_its_frames(stock, ours, tmp_path, fps):
    clip = encode(tmp_path / "clip.mp4", 75, 25, width=64, height=64)
    _, metadata = process(ours, clip, fps=fps)
    frames = decode(clip)[metadata.frames_indices]
    sampled = {"total_num_frames": 75, "fps": 25, "frames_indices": metadata.frames_indices}
    text = ours.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}], tokenize=False
    )
    options = {"do_sample_frames": False, "do_resize": False, "return_tensors": "pt"}
    expected = stock(text=[text], videos=[frames], video_metadata=[VideoMetadata(**sampled)], **options)
    inputs = chat(ours, clip, fps=fps)
    for name in ("input_ids", "mm_token_type_ids", "video_grid_thw", "pixel_values_videos"):
        assert torch.equal(inputs[name], expected[name]), name


def test_frames_that_are_not_evenly_spaced_tell_their_own_times(ours, tmp_path):
    clip = encode(tmp_path / "clip.mkv", times=[0, 100, 200, 900, 1000, 3000], width=64, height=64)
    inputs = chat(ours, clip, do_sample_frames=False)
    assert shown_times(ours, inputs) == [0.1, 0.6, 2.0]  # of 0.05, 0.55 and 2 s; stock would spread them evenly
    assert "second_per_grid_ts" not in inputs


def test_a_part_of_a_video_tells_the_times_of_the_whole(ours, clips):
    inputs = chat(ours, clips / "clip.mp4", fps=1, start=4, end=8, return_metadata=True)
    assert shown_times(ours, inputs) == [4.5, 6.5] and inputs["timestamps"] == [[4.0, 6.0]]


@pytest.mark.parametrize("request_", [{}, {"max_tokens": 700}, {"max_tokens": 700, "prefer": "frames"}, {"fps": 0.5}])
def test_a_budget_holds_the_text_of_the_times(ours, clips, request_):
    options = {"text_tokens": 0, **request_}
    plan = ours.video_processor.plan(clips / "clip.mp4", **options)
    inputs = chat(ours, clips / "clip.mp4", return_metadata=True, **options)
    assert inputs["video_metadata"][0].plan == plan and plan.height % 32 == plan.width % 32 == 0
    assert (inputs["input_ids"] == ours.video_token_id).sum() == plan.tokens
    placeholders = ours.replace_video_token(inputs, 0)
    assert plan.tokens < len(ours.tokenizer(placeholders)["input_ids"]) <= plan.prompt_tokens <= plan.budget
    assert f"and up to {plan.stamp_tokens} for their time, {plan.prompt_tokens:,} of" in str(plan)


def test_frames_have_64_tokens_as_with_the_other_backbone(ours, processor):
    for made in (ours, processor):
        assert made.video_processor.plan(VideoMetadata(80, fps=8, width=480, height=480)).frame_tokens == 64
    assert ours.video_processor.size == {"shortest_edge": 32**2, "longest_edge": 256**2}


def test_it_is_loaded_by_the_type_of_the_checkpoint(qwen3_repository, ours, clips):
    loaded = AutoProcessor.from_pretrained(qwen3_repository, trust_remote_code=True)
    assert type(loaded).__name__ == VideoNSAQwen3Processor.__name__
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded.to_dict() == ours.to_dict()
    actual, expected = (chat(processor, clips / "clip.mp4", fps=1) for processor in (loaded, ours))
    assert all(torch.equal(actual[name], x) for name, x in expected.items())
