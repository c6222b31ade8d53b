"""Prompts come to the planned number of tokens, and reading them to the planned memory."""

import functools
import inspect
import re
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata
from videos import chat, encode, process

import videonsa.processing_videonsa as processing
from videonsa.processing_videonsa import VideoNSAVideoProcessor


@pytest.fixture(scope="session")
def long_clips(tmp_path_factory):
    """The path of a clip of 15 s and 180 frames, 84 x 56, by suffix."""
    folder = tmp_path_factory.mktemp("long")
    return functools.cache(lambda suffix: encode(folder / f"clip{suffix}", 180, 12, width=84, height=56))


class TestBudget:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 40),
        st.sampled_from([(56, 56), (300, 200), (90, 40), (500, 300)]),
        st.sampled_from([1.0, 8.0, 29.97]),
        st.integers(1, 900),
        st.sampled_from(["pixels", "frames", "balanced"]),
        st.fixed_dictionaries(
            {},
            optional={
                "do_sample_frames": st.just(False),
                "block_size": st.sampled_from([4, 16]),
                "start": st.floats(0, 0.5),
                "end": st.floats(0.6, 5),
            },
        ),
        st.sampled_from([{}, {"fps": 0.7}, {"fps": 20}, {"num_frames": 3}, {"max_pixels": 9000}, {"frame_tokens": 7}]),
    )
    def test_the_model_gets_the_planned_tokens_and_no_others(
        self, processor, frames, size, rate, tokens, prefer, other, exact
    ):
        video = np.zeros((frames, *size[::-1], 3), np.uint8)
        metadata = {"total_num_frames": frames, "fps": rate}
        request = {"max_tokens": tokens, "text_tokens": 0, "prefer": prefer, **other, **exact}
        try:
            plan = processor.video_processor.plan(video, video_metadata=metadata, **request)
        except ValueError as error:
            message = str(error)
        else:
            inputs = chat(processor, video, video_metadata=[metadata], return_metadata=True, **request)
            placeholders = (inputs["input_ids"] == processor.video_token_id).sum()
            assert placeholders == plan.tokens == inputs["video_grid_thw"].prod() // 4 <= tokens
            assert inputs["video_grid_thw"][0].tolist() == [
                -(-plan.num_frames // 2),
                plan.height // 14,
                plan.width // 14,
            ]
            assert inputs["video_metadata"][0].plan == plan
            assert len(inputs["video_metadata"][0].frames_indices) == plan.num_frames
            return
        with pytest.raises(ValueError, match=re.escape(message)):
            chat(processor, video, video_metadata=[metadata], **request)

    def test_a_plan_of_a_file_is_what_reading_it_gives(self, processor, clips):
        for request in (
            {},
            {"max_tokens": 1500, "prefer": "frames"},
            {"fps": 1, "start": 2, "end": 6.5},
            {"frame_tokens": 9},
        ):
            plan = processor.video_processor.plan(clips / "clip.mp4", **request)
            features, metadata = process(processor, clips / "clip.mp4", **request)
            assert metadata.plan == plan and metadata.sampled_fps == plan.fps
            whole = VideoMetadata(metadata.total_num_frames, fps=metadata.fps, width=224, height=224)
            assert processor.video_processor.plan(whole, **request) == plan
            assert features["video_grid_thw"][0].prod() // 4 == plan.tokens
        assert str(processor.video_processor.plan(clips / "clip.mp4")) == (
            "32 frames of 224 × 224, 4 per second from 0.0 to 8.0 s; 64 tokens per 2 frames, 1,024 of 130,048 in all"
        )

    def test_there_is_no_hidden_cap_on_frames(self, processor):
        assert len(processor.video_processor.sample_frames(VideoMetadata(10**6, fps=30), max_tokens=10**7)) == 133_332
        video = np.zeros((5000, 28, 28, 3), np.uint8)
        assert process(processor, video)[0]["video_grid_thw"].tolist() == [[2500, 2, 2]]

    def test_preferences_divide_what_there_is(self, processor, clips):
        def grid(**request):
            return process(processor, clips / "clip.mp4", text_tokens=0, **request)[0]["video_grid_thw"][0].tolist()

        assert grid(max_tokens=256) == [4, 16, 16]
        assert grid(max_tokens=256, prefer="frames") == [16, 8, 8]
        assert grid(max_tokens=256, prefer="balanced") == [7, 12, 12]
        assert grid(max_tokens=256, fps=4) == [16, 8, 8]
        assert grid(max_tokens=256, max_pixels=112 * 112) == [16, 8, 8]
        assert grid(max_tokens=256, frame_tokens=36) == [7, 12, 12]
        assert grid(max_pixels=112 * 112, fps=8) == [32, 8, 8]
        with pytest.raises(ValueError, match="32 frames of 224 × 224 are 1,024 tokens"):
            grid(max_tokens=256, fps=4, max_pixels=224 * 224)

    @settings(max_examples=25, deadline=None)
    @given(
        st.sampled_from([".mp4", ".mkv", ".ts"]),
        st.integers(150, 900),
        st.sampled_from(["pixels", "frames", "balanced"]),
        st.sampled_from([{}, {"fps": 11.5}, {"num_frames": 43}, {"frame_tokens": 2}, {"start": 1.1}, {"end": 14.2}]),
    )
    def test_files_of_many_frames_come_to_the_planned_tokens_too(
        self, processor, long_clips, suffix, tokens, prefer, other
    ):
        path, request = long_clips(suffix), {"max_tokens": tokens, "text_tokens": 0, "prefer": prefer, **other}
        plan = processor.video_processor.plan(path, **request)
        inputs = chat(processor, path, return_metadata=True, **request)
        placeholders = (inputs["input_ids"] == processor.video_token_id).sum()
        assert placeholders == plan.tokens == inputs["video_grid_thw"].prod() // 4 <= tokens
        assert inputs["pixel_values_videos"].shape[0] == 4 * plan.tokens
        (metadata,) = inputs["video_metadata"]
        assert metadata.plan == plan and len(metadata.frames_indices) == plan.num_frames > 40
        assert metadata.frames_indices == [int(time * 12 + 1e-6) for time in plan.times]

    def test_numbers_may_be_of_numpy_and_settings_must_exist(self, processor, clips):
        for request in ({"num_frames": 6}, {"max_pixels": 9000}, {"max_tokens": 1500}, {"block_size": 16}):
            numpy = {name: np.int64(value) for name, value in request.items()}
            assert processor.video_processor.plan(clips / "clip.mp4", **numpy) == processor.video_processor.plan(
                clips / "clip.mp4", **request
            )
        request = {"fps": np.float32(0.5), "start": np.float32(1)}
        assert process(processor, clips / "clip.mp4", **request)[0]["video_grid_thw"].tolist() == [[1, 16, 16]]
        with pytest.raises(TypeError, match="unknown settings: numframes"):
            processor.video_processor.plan(clips / "clip.mp4", numframes=6)

    def test_it_can_be_set_once_for_all(self, clips):
        video_processor = VideoNSAVideoProcessor(max_tokens=1024 + 256, prefer="frames")
        assert video_processor(clips / "clip.mp4")["video_grid_thw"].tolist() == [[16, 8, 8]]
        assert VideoNSAVideoProcessor(frame_tokens=16)(clips / "clip.mp4")["video_grid_thw"].tolist() == [[16, 8, 8]]

    def test_frames_taken_as_they_are_are_not_counted(self, processor):
        video = np.zeros((12, 56, 56, 3), np.uint8)
        assert process(processor, video, do_resize=False)[0]["video_grid_thw"].tolist() == [[6, 4, 4]]
        with pytest.raises(ValueError, match="do_resize=False needs sides that are multiples of 28, got 60 × 56"):
            process(processor, np.zeros((12, 56, 60, 3), np.uint8), do_resize=False)

    def test_floats_are_not_held_twice(self, tmp_path):
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest
            import resource, numpy
            from videonsa.processing_videonsa import VideoNSAVideoProcessor
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            process, video = VideoNSAVideoProcessor(), numpy.zeros((500, 224, 224, 3), numpy.uint8)
            process(video[:4])
            before = peak()
            floats = process(video)["pixel_values_videos"]
            print(peak() - before - floats.nbytes * 5 // 4 // 2**20)
        """
        done = forks.run("-c", inspect.cleandoc(script))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 150  # MB, besides 72 of frames and 287 of floats

    def test_pixels_of_a_file_are_given_up_as_floats_are_made_of_them(self, tmp_path):
        path = encode(tmp_path / "clip.mp4", 800, 8, width=224, height=224, codec="mpeg4")
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest
            import resource
            from videonsa import processing_videonsa
            from videonsa.processing_videonsa import VideoNSAVideoProcessor
            processing_videonsa.PART_BYTES = 2**24  # bytes, as the clip is short
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            process = VideoNSAVideoProcessor()
            process({str(path)!r}, num_frames=4)
            before = peak()
            floats = process({str(path)!r}, fps=8)["pixel_values_videos"]
            print(peak() - before - floats.nbytes // 2**20)
        """
        done = forks.run("-c", inspect.cleandoc(script))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 130  # MB, besides 459 of floats; there are 115 of pixels

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 41), st.integers(1, 30), st.integers(1, 12))
    def test_parts_and_chunks_of_any_size_give_the_same(self, processor, long_clips, frames, part, chunk):
        path, numbers = long_clips(".mp4"), 3 * 56 * 84
        expected, _ = process(processor, path, num_frames=frames)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processing, "PART_BYTES", part * numbers)
            patch.setattr(processing, "CHUNK_NUMBERS", chunk * numbers)
            features, _ = process(processor, path, num_frames=frames)
        assert torch.equal(features["pixel_values_videos"], expected["pixel_values_videos"])
        assert torch.equal(features["video_grid_thw"], expected["video_grid_thw"])
