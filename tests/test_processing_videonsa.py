"""From a video file to model inputs: which frames, at which times, with which pixels.

Flat clips of `videos.py` tell which frames were taken.
"""

import inspect
import struct
from fractions import Fraction
from pathlib import Path

import av
import forks
import numpy as np
import pytest
import torch
from transformers import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata
from videos import (
    B_FRAMES,
    PAPER_SIZE,
    REAL_CLIP,
    chat,
    decode,
    encode,
    needs_real_clip,
    packets,
    pil_frames,
    process,
    shown,
)

import videonsa.processing_videonsa as processing
from lib import tiny
from videonsa.processing_videonsa import VideoNSAVideoProcessor


class TestSampling:
    def test_a_file_is_sampled_at_four_frames_per_second(self, processor, clips):
        features, metadata = process(processor, clips / "clip.mp4")
        assert features["video_grid_thw"].tolist() == [[16, 16, 16]]
        assert features["pixel_values_videos"].shape == (16 * 16 * 16, 3 * 2 * 14 * 14)
        assert metadata.frames_indices == list(range(0, 64, 2))
        assert metadata.timestamps == [k / 4 for k in range(32)]
        assert (metadata.fps, metadata.total_num_frames, metadata.duration) == (8, 64, 8)
        assert (metadata.width, metadata.height, metadata.video_backend) == (224, 224, "pyav")
        assert metadata.sampled_fps == 4

    @needs_real_clip
    def test_the_real_clip_gives_the_numbers_worked_out_by_hand(self, processor):
        inputs = chat(processor, str(REAL_CLIP), return_metadata=True)
        duration = 491 / 3
        assert inputs["video_grid_thw"].tolist() == [[245, 12, 20]]
        assert (inputs["input_ids"] == processor.video_token_id).sum() == 14_700
        assert inputs["second_per_grid_ts"].item() == pytest.approx(2 * duration / 490)
        metadata = inputs["video_metadata"][0]
        assert metadata.frames_indices == [k * 491 // 490 for k in range(490)]
        assert metadata.timestamps == pytest.approx([(k * 491 // 490) / 3 for k in range(490)])

    @pytest.mark.parametrize("fps", [3, 8, 24, 29.97, 60])
    def test_constant_frame_rate_follows_the_stock_rule(self, processor, fps):
        stock = Qwen2VLVideoProcessor(min_frames=2, max_frames=4064)  # what the budget holds
        for total in [*range(2, 150), 491, 1000, 5000, 100_000]:
            metadata = VideoMetadata(total, fps=fps)
            ours = processor.video_processor.sample_frames(metadata).tolist()
            # The stock class steps by a float32, which at times comes to one index too many.
            theirs = stock.sample_frames(metadata, fps=4).tolist()
            assert ours == theirs[: len(ours)] and len(theirs) - len(ours) in (0, 1)
            assert ours == [k * total // len(ours) for k in range(len(ours))]

    @pytest.mark.parametrize(
        ("frames", "request_", "expected"),
        [
            (32, {}, 16),
            (32, {"fps": 2}, 8),
            (32, {"fps": 100}, 32),
            (27, {}, 12),  # 3.375 s: 13, rounded down
            (27, {"fps": 8}, 26),
            (32, {"fps": 0.01}, 2),
            (32, {"max_frames": 5}, 4),
            (32, {"fps": 1, "min_frames": 9}, 8),
            (32, {"num_frames": 6}, 6),
            (32, {"num_frames": 7}, 8),
            (32, {"num_frames": 1}, 2),
            (3, {"num_frames": 3}, 2),
            (3, {}, 2),
            (1, {}, 1),
            (32, {"do_sample_frames": False}, 32),
            (27, {"do_sample_frames": False}, 27),
        ],
    )
    def test_the_number_of_frames_is_even_and_within_bounds(self, processor, tmp_path, frames, request_, expected):
        features, metadata = process(processor, encode(tmp_path / "clip.mp4", frames), **request_)
        assert len(metadata.frames_indices) == len(metadata.timestamps) == expected
        assert features["video_grid_thw"][0, 0] == (expected + 1) // 2

    def test_a_video_beyond_the_budget_is_sampled_more_sparsely(self, processor):
        hours = VideoMetadata(3 * 3600 * 30, fps=30)
        indices = processor.video_processor.sample_frames(hours)
        assert len(indices) == 4064 and indices[-1] == 4063 * len(range(3 * 3600 * 30)) // 4064

    def test_no_frame_is_lost_to_the_rounding_of_times(self, processor):
        sample = processor.video_processor.sample_frames
        assert len(sample(VideoMetadata(48, fps=48 / 1.999))) == 8  # two seconds, in whole milliseconds
        times = {"frames_indices": [0, 1, 2, 3], "frame_times": [0, 0.9, 1.0, 1.1]}
        metadata = processing.SampledVideoMetadata(4, fps=4 / 1.2, duration=1.2, **times)
        assert sample(metadata, num_frames=4).tolist() == [0, 0, 0, 1]  # as a float, 3 * 1.2 / 4 is less than 0.9

    def test_num_frames_set_on_the_processor_replaces_fps(self, clips):
        video_processor = VideoNSAVideoProcessor(num_frames=8)
        assert video_processor(clips / "clip.mp4")["video_grid_thw"][0, 0] == 4
        assert video_processor(clips / "clip.mp4", fps=1)["video_grid_thw"][0, 0] == 4
        assert video_processor(clips / "clip.mp4", num_frames=4)["video_grid_thw"][0, 0] == 2


class TestTimes:
    @pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts", "clip.h264", "clip.flv"])
    def test_frames_stored_out_of_order_are_shown_in_order(self, processor, tmp_path, name):
        path = encode(tmp_path / name, options=B_FRAMES)
        if name in ("clip.mp4", "clip.mkv"):
            stored = [packet.pts for packet in packets(path)]
            assert stored != sorted(stored)
        assert shown(processor, path) == list(range(0, 32, 2))
        assert process(processor, path)[1].timestamps == pytest.approx([k / 4 for k in range(16)])

    @pytest.mark.parametrize("fps", [24, 30, Fraction(30000, 1001)])
    def test_matroska_without_frame_count_and_in_whole_milliseconds(self, processor, tmp_path, fps):
        path = encode(tmp_path / "clip.mkv", 72, fps)
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 0
        count = int(72 / fps * 4) // 2 * 2
        _, metadata = process(processor, path)
        assert metadata.frames_indices == [k * 72 // count for k in range(count)]
        assert metadata.sampled_fps == pytest.approx(count / (72 / fps))
        assert metadata.timestamps == pytest.approx([k * 72 // count / fps for k in range(count)], abs=1e-3)

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_variable_frame_rate_is_sampled_by_time(self, processor, tmp_path, suffix):
        # Ten frames in the first second, then one at each second; for how long the last one stays, the muxers differ.
        times = [*range(0, 1000, 100), *range(1000, 10_001, 1000)]
        path = encode(tmp_path / f"clip{suffix}", times=times)
        _, everything = process(processor, path, do_sample_frames=False)
        assert everything.timestamps == pytest.approx([time / 1000 for time in times])
        expected = {  # by how long the last frame stays
            11.0: [0, 10, 12, 14, 16, 18],  # at 0, 1.83, 3.67, 5.5, 7.33 and 9.17 s
            10.125: [0, 10, 12, 14, 15, 17],  # at 0, 1.69, 3.38, 5.06, 6.75 and 8.44 s
            10.1: [0, 10, 12, 14, 15, 17],  # at 0, 1.68, 3.37, 5.05, 6.73 and 8.42 s; MP4 of PyAV 15
        }[round(everything.duration, 3)]
        _, metadata = process(processor, path, num_frames=6)
        assert metadata.frames_indices == shown(processor, path, num_frames=6) == expected
        assert metadata.timestamps == pytest.approx([times[i] / 1000 for i in expected])
        assert metadata.sampled_fps == pytest.approx(6 / everything.duration)

    def test_a_frame_that_stays_on_screen_is_shown_again(self, processor, tmp_path):
        path = encode(tmp_path / "clip.mkv", times=[0, 100, 200, 300, 1000, 1100, 5000, 5100])
        assert shown(processor, path) == [0, 3, 5, 5, 5, 5, 5, 5]  # every 0.65 s

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
    def test_time_starts_at_the_first_frame(self, processor, tmp_path, suffix):
        path = encode(tmp_path / f"clip{suffix}", times=[1600 + 125 * i for i in range(32)])
        assert packets(path)[0].pts > 0
        _, metadata = process(processor, path)
        assert metadata.timestamps == pytest.approx([k / 4 for k in range(16)])
        assert shown(processor, path) == list(range(0, 32, 2))

    def test_frames_cut_by_an_edit_list_are_not_counted(self, processor, tmp_path):
        data = bytearray(encode(tmp_path / "clip.mp4", options={"bf": "0"}).read_bytes())
        edit = data.index(b"elst") + 12
        duration, start = struct.unpack(">Ii", data[edit : edit + 8])
        with av.open(str(tmp_path / "clip.mp4")) as container:
            second = int(1 / container.streams.video[0].time_base)
        data[edit : edit + 8] = struct.pack(">Ii", duration // 2, start + second)
        (tmp_path / "trimmed.mp4").write_bytes(data)
        assert shown(processor, tmp_path / "trimmed.mp4") == list(range(8, 24, 2))

    def test_a_recording_that_starts_between_key_frames_begins_at_the_first(self, processor, tmp_path):
        options = {"g": "8", "bf": "0", "x264-params": "scenecut=0"}
        path = encode(tmp_path / "clip.ts", fps=25, options=options)
        (tmp_path / "cut.ts").write_bytes(path.read_bytes()[9 * 188 :])
        keys = [packet.is_keyframe for packet in packets(tmp_path / "cut.ts")]
        assert not keys[0] and any(keys)
        assert shown(processor, tmp_path / "cut.ts", do_sample_frames=False) == list(range(8, 32))

    def test_the_model_gets_the_seconds_of_a_temporal_patch(self, processor, tmp_path):
        paths = [encode(tmp_path / "a.mp4", 27), encode(tmp_path / "b.mkv", times=[0, 500, 1000, 6000])]
        inputs = chat(processor, *paths)
        metadata = [process(processor, path)[1] for path in paths]
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 * 3.375 / 12, 2 * metadata[1].duration / 4])
        assert chat(processor, paths[0], fps=1)["second_per_grid_ts"].item() == pytest.approx(2 * 3.375 / 2)


class TestPixels:
    @pytest.mark.parametrize(("width", "height"), [(224, 224), (398, 226), (102, 38), (640, 360)])
    def test_they_are_those_of_the_stock_class_fed_with_the_same_frames(self, processor, tmp_path, width, height):
        path = tiny.make_clip(tmp_path / "clip.mp4", seconds=2, width=width, height=height)
        self.check(processor, path, 16, 8)

    @needs_real_clip
    def test_they_are_those_of_the_stock_class_on_the_real_clip(self, processor):
        self.check(processor, REAL_CLIP, 491, 3, num_frames=24)

    def check(self, processor, path, total, fps, **kwargs):
        stock = Qwen2VLVideoProcessor(size=PAPER_SIZE, min_frames=2, cap_pixels_per_frame=False)
        theirs = stock(
            decode(path),
            video_metadata=[{"total_num_frames": total, "fps": fps}],
            do_sample_frames=True,
            **(kwargs or {"fps": 4}),
        )
        ours, metadata = process(processor, path, **kwargs)
        assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])
        assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
        # The same frames as a list and as an array, sampled already.
        frames = decode(path)[metadata.frames_indices]
        for video in (list(frames), frames, frames.permute(0, 2, 3, 1).numpy()):
            again, _ = process(processor, video)
            assert torch.equal(again["pixel_values_videos"], theirs["pixel_values_videos"])

    def test_frames_are_resized_only_where_asked(self, processor, tmp_path):
        path = encode(tmp_path / "clip.mp4", 8, width=112, height=56)
        assert process(processor, path, do_resize=False)[0]["video_grid_thw"].tolist() == [[2, 4, 8]]
        small = {"shortest_edge": 28 * 28, "longest_edge": 2 * 28 * 28}
        assert process(processor, path, size=small)[0]["video_grid_thw"].tolist() == [[2, 2, 4]]

    def test_the_stock_cap_on_the_pixels_of_a_whole_video_still_works(self, clips):
        video_processor = VideoNSAVideoProcessor(cap_pixels_per_frame=True, max_video_tokens=512)
        stock = Qwen2VLVideoProcessor(size=PAPER_SIZE, cap_pixels_per_frame=True, max_video_tokens=512)
        ours = video_processor(clips / "clip.mp4")
        theirs = stock(decode(clips / "clip.mp4")[::2])
        assert ours["video_grid_thw"].tolist() == theirs["video_grid_thw"].tolist() != [[16, 16, 16]]
        assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])

    def test_full_size_frames_are_never_held_together(self, tmp_path):
        path = encode(tmp_path / "clip.mp4", 120, width=1280, height=720, codec="mpeg4")  # 330 MB of frames
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest
            import resource, torch; torch.set_num_threads(1)
            from videonsa.processing_videonsa import VideoNSAVideoProcessor
            process = VideoNSAVideoProcessor(fps=8, size={{"shortest_edge": 28 * 28, "longest_edge": 8 * 28 * 28}})
            process({str(path)!r}, num_frames=2)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert process({str(path)!r})["video_grid_thw"][0, 0] == 60
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
        """
        done = forks.run("-c", inspect.cleandoc(script))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 100  # MB; the patches, 7 MB of floats, are held a few times


class TestPartsAndTimes:
    def test_a_part_of_a_video_is_sampled_from_its_start(self, processor, clips):
        inputs = chat(processor, clips / "clip.mp4", start=2, end=4, return_metadata=True)
        assert inputs["video_metadata"][0].frames_indices == list(range(16, 32, 2))
        assert inputs["second_per_grid_ts"].tolist() == [0.5]
        assert inputs["timestamps"] == [[2, 2.5, 3, 3.5]]
        _, metadata = process(processor, clips / "clip.mp4", start=7.99, num_frames=1)
        assert metadata.frames_indices == [63] and metadata.timestamps == [63 / 8]
        frames, metadata = pil_frames(8), {"total_num_frames": 8, "fps": 2}
        assert shown(processor, frames, start=0.5, end=1) == [2, 3]
        assert shown(processor, frames, video_metadata=metadata, fps=2, start=1, end=3) == [2, 3, 4, 5]
        assert shown(processor, clips / "clip.mp4", do_sample_frames=False, start=7.5) != []
        for request in ({"start": 8}, {"start": 3, "end": 2}, {"start": -1}):
            with pytest.raises(ValueError, match="leave nothing of a video of 8.000 s"):
                chat(processor, clips / "clip.mp4", **request)

    def test_timestamps_are_those_of_temporal_patches_and_come_with_the_metadata(self, processor, tmp_path):
        paths = [encode(tmp_path / "a.mp4", 27), encode(tmp_path / "b.mkv", times=[0, 500, 1000, 6000])]
        inputs = chat(processor, *paths, pil_frames(3), return_metadata=True)
        assert inputs["timestamps"][0] == pytest.approx([k * 2 * 3.375 / 12 for k in range(6)])
        duration = inputs["video_metadata"][1].duration
        assert inputs["timestamps"][1] == pytest.approx([0, duration / 2])
        assert inputs["timestamps"][2] == [0, 0.5]
        assert "timestamps" not in chat(processor, *paths)
        assert chat(processor, encode(tmp_path / "one.mp4", 1), return_metadata=True)["timestamps"] == [[0]]

    def test_uneven_times_reach_the_model_patch_by_patch(self, processor, tmp_path):
        times = [0, 250, 500, 1000, 5000, 9000, 9100]
        paths = [encode(tmp_path / "a.mkv", times=times), encode(tmp_path / "b.mp4", 8)]
        inputs = chat(processor, *paths, do_sample_frames=False, return_metadata=True)
        assert inputs["timestamps"] == [[0, 0.5, 5, 9.1], [0, 0.25, 0.5, 0.75]]
        assert inputs["second_per_grid_ts"].tolist() == [pytest.approx([0, 0.5, 5, 9.1]), [0, 0.25, 0.5, 0.75]]
        sampled = {"total_num_frames": 320, "fps": 10, "frames_indices": [0, 1, 2, 50, 51, 300]}
        inputs = chat(processor, pil_frames(6), video_metadata=[sampled], do_sample_frames=False)
        assert inputs["second_per_grid_ts"].tolist() == [pytest.approx([0, 0.2, 5.1])]
        # Even, but for the rounding to frames of the source.
        sampled["frames_indices"] = [0, 53, 107, 160, 213, 267]
        inputs = chat(processor, pil_frames(6), video_metadata=[sampled], do_sample_frames=False)
        assert inputs["second_per_grid_ts"].ndim == 1


class TestRotation:
    def test_a_video_filmed_sideways_is_read_upright(self, processor, tmp_path):
        image = np.zeros((56, 112, 3), np.uint8)
        image[:, :56] = 255  # the left half is white, which turned clockwise is the upper one
        path = tmp_path / "phone.mp4"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("libx264", rate=4)
            stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
            for _ in range(4):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            output.mux(stream.encode())
        content = bytearray(path.read_bytes())
        matrix = content.index(b"tkhd") + 4 + 40
        content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
        path.write_bytes(content)
        features, metadata = process(processor, path, do_rescale=False, do_normalize=False)
        assert (metadata.width, metadata.height) == (56, 112)
        assert features["video_grid_thw"].tolist() == [[2, 8, 4]]
        patches = features["pixel_values_videos"].float().view(2, 4, 2, 4, -1).mean((0, 3, 4))  # [rows, columns]
        assert patches[:2].min() > 200 and patches[2:].max() < 50
