"""From a video in any form to model inputs: which frames, at which times, with which pixels, in how many tokens.

The clips made here are flat: frame i is grey level 8 + 3i, so that a sampled frame can be told from its pixels.
"""

import functools
import http.server
import importlib
import inspect
import io
import itertools
import re
import struct
import subprocess
import sys
import threading
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging import version
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor, Qwen2VLVideoProcessor
from transformers.dynamic_module_utils import check_imports, get_imports
from transformers.video_utils import VideoMetadata

import tiny
import videonsa.processing_videonsa as processing
from videonsa.processing_videonsa import VideoNSAProcessor, VideoNSAVideoProcessor

REAL_CLIP = Path(__file__).resolve().parents[2] / "shared/clips/v_TpB_zMG3XBA.mp4"
B_FRAMES = {"bf": "2", "x264-params": "b-adapt=0:scenecut=0"}
PAPER_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
needs_real_clip = pytest.mark.skipif(not REAL_CLIP.exists(), reason=f"{REAL_CLIP} is not here")


@pytest.fixture(scope="session")
def processor(tmp_path_factory) -> VideoNSAProcessor:
    stock = tiny.make_stock_checkpoint(tmp_path_factory.mktemp("stock"), hidden_size=112, num_hidden_layers=1)
    return VideoNSAProcessor(
        image_processor=AutoImageProcessor.from_pretrained(stock),
        tokenizer=AutoTokenizer.from_pretrained(stock),
        video_processor=VideoNSAVideoProcessor(),
        chat_template=tiny.CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with `clip.mp4`: H.264, 8 s of 64 frames, 224 x 224."""
    folder = tmp_path_factory.mktemp("clips")
    tiny.make_clip(folder / "clip.mp4")
    return folder


@pytest.fixture(scope="session")
def long_clips(tmp_path_factory):
    """The path of a clip of 15 s and 180 frames, 84 x 56, by suffix."""
    folder = tmp_path_factory.mktemp("long")
    return functools.cache(lambda suffix: encode(folder / f"clip{suffix}", 180, 12, width=84, height=56))


def encode(path, frames=32, fps=8, *, times=None, width=56, height=56, codec="libx264", container=None, options=None):
    """Encode flat frames at a constant rate, or at `times` in milliseconds; returns `path`."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames if times is None else len(times)):
            image = np.full((height, width, 3), 8 + 3 * i % 240, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def packets(path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def decode(path) -> torch.Tensor:
    """All frames of a file, uint8 [frames, 3, H, W]."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def process(processor, video, **kwargs):
    """Features of one video by the video processor, and its metadata."""
    features = processor.video_processor(video, return_tensors="pt", return_metadata=True, **kwargs)
    return features, features["video_metadata"][0]


def shown(processor, video, **kwargs) -> list[int]:
    """Indices of the flat frames that the model gets to see, told from their grey levels."""
    features, _ = process(processor, video, do_rescale=False, do_normalize=False, **kwargs)
    t, h, w = features["video_grid_thw"][0].tolist()
    grey = features["pixel_values_videos"].float().view(t, h * w, 3, 2, 14 * 14).mean((1, 2, 4)).flatten()
    return ((grey - 8) / 3).round().int().tolist()


def chat(processor, *videos, images=(), **processor_kwargs):
    """Model inputs of a one-turn conversation."""
    content = [{"type": "video", "video": video} for video in videos]
    content += [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "What happens?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def pil_frames(count, width=64, height=48) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), (8 + 3 * i,) * 3) for i in range(count)]


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
        path = encode(tmp_path / "clip.mp4", 240, width=1280, height=720, codec="mpeg4")  # 660 MB of frames
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest
            import resource, torch; torch.set_num_threads(1)
            from videonsa.processing_videonsa import VideoNSAVideoProcessor
            process = VideoNSAVideoProcessor(fps=8, size={{"shortest_edge": 28 * 28, "longest_edge": 8 * 28 * 28}})
            process({str(path)!r}, num_frames=2)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert process({str(path)!r})["video_grid_thw"][0, 0] == 120
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
        """
        done = subprocess.run([sys.executable, "-c", inspect.cleandoc(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 150  # MB; the patches, 18 MB of floats, are held a few times


class TestForms:
    @pytest.mark.parametrize("form", [str, Path, lambda path: f"file://{path}"])
    def test_a_file_may_be_a_path_or_a_url(self, processor, tmp_path, form):
        path = encode(tmp_path / "a clip.mp4")
        assert shown(processor, form(path)) == list(range(0, 32, 2))
        assert chat(processor, form(path))["video_grid_thw"].tolist() == [[8, 4, 4]]
        inputs = processor(text="<|video_pad|>", videos=form(path), return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 8 * 2 * 2)

    def test_a_file_url_may_be_quoted(self, processor, tmp_path):
        path = encode(tmp_path / "a clip.mp4", 8)
        assert shown(processor, path.as_uri()) == [0, 2, 4, 6]

    def test_a_file_may_be_on_a_server(self, processor, clips, monkeypatch):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        monkeypatch.setenv("no_proxy", "127.0.0.1")
        handler = functools.partial(Handler, directory=str(clips))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            assert chat(processor, f"{url}/clip.mp4")["video_grid_thw"].tolist() == [[16, 16, 16]]
            with pytest.raises(ValueError, match="404"):
                chat(processor, f"{url}/missing.mp4")
            server.shutdown()

    @pytest.mark.parametrize("form", ["pil", "paths", "arrays", "array", "tensor"])
    def test_frames_count_as_sampled_at_four_per_second(self, processor, tmp_path, form):
        frames = pil_frames(8)
        arrays = [np.array(frame) for frame in frames]
        for i, frame in enumerate(frames):
            frame.save(tmp_path / f"{i}.png")
        video = {
            "pil": frames,
            "paths": [tmp_path / "0.png", *(f"{tmp_path}/{i}.png" for i in range(1, 7)), f"file://{tmp_path}/7.png"],
            "arrays": arrays,
            "array": np.stack(arrays),
            "tensor": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2),
        }[form]
        assert shown(processor, video) == list(range(8))
        inputs = chat(processor, video)
        assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]
        assert inputs["second_per_grid_ts"].tolist() == [0.5]
        assert chat(processor, video, fps=2)["second_per_grid_ts"].tolist() == [1]
        assert shown(processor, video, num_frames=4) == [0, 2, 4, 6]
        assert chat(processor, video, num_frames=4)["second_per_grid_ts"].tolist() == [1]

    def test_a_folder_of_images_is_a_video_in_the_order_of_their_numbers(self, processor, tmp_path):
        for i, frame in enumerate(pil_frames(12)):
            frame.save(tmp_path / f"frame{i}.png")
        (tmp_path / "notes.txt").touch()
        for video in (tmp_path, str(tmp_path), [tmp_path], tmp_path.as_uri()):
            assert shown(processor, video) == list(range(12))
            assert chat(processor, video, fps=2)["second_per_grid_ts"].tolist() == [1]

    def test_a_file_may_be_bytes_or_open(self, processor, tmp_path):
        path = encode(tmp_path / "clip.mp4")
        for video in (path.read_bytes(), io.BytesIO(path.read_bytes()), path.open("rb"), [path.read_bytes()]):
            assert chat(processor, video)["video_grid_thw"].tolist() == [[8, 4, 4]]

    def test_an_odd_number_of_frames_is_kept(self, processor):
        inputs = chat(processor, pil_frames(7))
        assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]
        assert inputs["second_per_grid_ts"].tolist() == [0.5]

    @pytest.mark.parametrize("as_list", [False, True])
    def test_frames_with_metadata_are_sampled_by_it(self, processor, as_list):
        video = torch.stack([torch.full((3, 56, 56), 8 + 3 * i, dtype=torch.uint8) for i in range(32)])
        video = list(video) if as_list else video
        metadata = {"total_num_frames": 32, "fps": 16}
        assert shown(processor, video, video_metadata=[metadata]) == list(range(0, 32, 4))
        assert shown(processor, video, video_metadata=metadata, num_frames=2) == [0, 16]
        assert shown(processor, video, video_metadata=metadata, do_sample_frames=False) == list(range(32))
        with pytest.raises(ValueError, match="of 64 frames, the video has 32"):
            process(processor, video, video_metadata=[{"total_num_frames": 64, "fps": 16}])
        with pytest.raises(ValueError, match="1 videos, but 2 entries"):
            process(processor, video, video_metadata=[metadata, metadata])
        sampled = {"total_num_frames": 320, "fps": 10, "frames_indices": list(range(0, 320, 10))}
        inputs = chat(processor, video, video_metadata=[[sampled]], do_sample_frames=False)
        assert inputs["second_per_grid_ts"].tolist() == [2]

    @pytest.mark.parametrize("total", [12, 64])  # as qwen_vl_utils counts: of the part, or of the whole video
    def test_frames_of_a_part_are_all_taken_and_keep_their_times(self, processor, total):
        metadata = {"total_num_frames": total, "fps": 8, "frames_indices": list(range(48, 60, 2))}
        request = {"video_metadata": [metadata], "do_sample_frames": False}
        inputs = chat(processor, pil_frames(6), **request, return_metadata=True)
        assert inputs["video_grid_thw"].tolist() == [[3, 4, 4]]
        assert inputs["timestamps"] == [[6, 6.5, 7]]
        assert shown(processor, pil_frames(6), **request, start=6.5, end=7) == [2, 3]

    def test_a_batch_may_mix_them(self, processor, clips):
        frames = np.zeros((6, 60, 90, 3), np.uint8)
        videos = [[pil_frames(4), clips / "clip.mp4"], [frames, str(clips / "clip.mp4")]]
        text = ["<|video_pad|> and <|video_pad|>", "<|video_pad|><|video_pad|>"]
        inputs = processor(text=text, videos=videos, padding=True, return_tensors="pt", return_metadata=True)
        assert inputs["video_grid_thw"].tolist() == [[2, 4, 4], [16, 16, 16], [3, 4, 6], [16, 16, 16]]
        assert inputs["pixel_values_videos"].shape[0] == inputs["video_grid_thw"].prod(-1).sum()
        assert inputs["second_per_grid_ts"].tolist() == [0.5] * 4
        assert [len(metadata.frames_indices) for metadata in inputs["video_metadata"]] == [4, 32, 6, 32]
        assert (inputs["input_ids"] == processor.video_token_id).sum(1).tolist() == [8 + 1024, 18 + 1024]

    def test_other_things_are_not_videos(self, processor):
        for thing in (None, 3, {"video": "clip.mp4"}, np.zeros((3, 3)), [None]):
            with pytest.raises(ValueError, match="not a video"):
                process(processor, thing)
        with pytest.raises(ValueError, match="no video"):
            process(processor, [])
        with pytest.raises(ValueError, match="frame 1 is"):
            process(processor, [torch.zeros(3, 56, 56), torch.zeros(3, 112, 56)])


class TestChat:
    def test_every_video_gets_its_placeholders(self, processor, clips, tmp_path):
        inputs = chat(processor, clips / "clip.mp4", pil_frames(4), encode(tmp_path / "small.mp4", 16))
        assert inputs["video_grid_thw"].tolist() == [[16, 16, 16], [2, 4, 4], [4, 4, 4]]
        runs = [len(list(run)) for token, run in itertools.groupby(inputs["input_ids"][0].tolist()) if token == 262]
        assert processor.video_token_id == 262 and runs == [1024, 8, 16]
        assert (inputs["mm_token_type_ids"] == 2).sum() == sum(runs)

    def test_images_keep_the_stock_path(self, processor, tmp_path):
        image = pil_frames(1, 448, 448)[0]
        inputs = chat(processor, encode(tmp_path / "clip.mp4", 16), images=[image])
        assert inputs["image_grid_thw"].tolist() == [[1, 32, 32]]
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 256
        only_image = chat(processor, images=[image])
        assert torch.equal(only_image["pixel_values"], inputs["pixel_values"])
        assert "pixel_values_videos" not in only_image

    def test_text_alone_works(self, processor):
        inputs = chat(processor)
        assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert not inputs["mm_token_type_ids"].any()

    def test_a_padded_batch_holds_what_each_prompt_gives_alone(self, processor, clips):
        turns = [[{"type": "video", "video": clips / "clip.mp4"}], [{"type": "video", "video": pil_frames(6)}], []]
        conversations = [[{"role": "user", "content": [*turn, {"type": "text", "text": "Hm?"}]}] for turn in turns]
        template = functools.partial(
            processor.apply_chat_template, tokenize=True, return_dict=True, return_tensors="pt"
        )
        batch = template(conversations, processor_kwargs={"padding": True})
        assert batch["video_grid_thw"].tolist() == [[16, 16, 16], [3, 4, 4]]
        for conversation, ids, mask in zip(conversations, batch["input_ids"], batch["attention_mask"], strict=True):
            assert torch.equal(ids[mask.bool()], template(conversation)["input_ids"][0])

    def test_sampling_and_size_can_be_set_in_the_call(self, processor, clips):
        clip = clips / "clip.mp4"
        assert chat(processor, clip, fps=1)["video_grid_thw"].tolist() == [[4, 16, 16]]
        assert chat(processor, clip, num_frames=6)["video_grid_thw"].tolist() == [[3, 16, 16]]
        assert chat(processor, clip, max_frames=4)["video_grid_thw"].tolist() == [[2, 16, 16]]
        assert chat(processor, clip, videos_kwargs={"fps": 1})["video_grid_thw"].tolist() == [[4, 16, 16]]
        size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
        assert chat(processor, clip, videos_kwargs={"size": size})["video_grid_thw"].tolist() == [[16, 8, 8]]

    def test_the_number_of_tokens_can_be_told_beforehand(self, processor):
        assert processor.video_processor.get_num_of_video_patches(32, 720, 1280, {}) == 16 * 12 * 20
        sizes = {"image_sizes": [(448, 448)], "video_sizes": [(32, 224, 224)]}
        if version.parse(transformers.__version__) < version.parse("5.23"):
            del sizes["video_sizes"]  # which the stock class of 5.17 cannot count: it calls a method that is not there
        counts = processor._get_num_multimodal_tokens(**sizes)
        assert counts.num_image_tokens == [256]
        assert counts.num_video_tokens == ([1024] if "video_sizes" in sizes else None)

    def test_it_warns_of_nothing(self, processor, clips, recwarn, capfd):
        chat(processor, clips / "clip.mp4", return_metadata=True)
        assert not recwarn.list and "Qwen2VL" not in capfd.readouterr().err


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
            process, video = VideoNSAVideoProcessor(), numpy.zeros((1000, 224, 224, 3), numpy.uint8)
            process(video[:4])
            before = peak()
            floats = process(video)["pixel_values_videos"]
            print(peak() - before - floats.nbytes * 5 // 4 // 2**20)
        """
        done = subprocess.run([sys.executable, "-c", inspect.cleandoc(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 200  # MB, besides 144 of frames and 574 of floats

    def test_pixels_of_a_file_are_given_up_as_floats_are_made_of_them(self, tmp_path):
        path = encode(tmp_path / "clip.mp4", 1600, 8, width=224, height=224, codec="mpeg4")
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest
            import resource
            from videonsa.processing_videonsa import VideoNSAVideoProcessor
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            process = VideoNSAVideoProcessor()
            process({str(path)!r}, num_frames=4)
            before = peak()
            floats = process({str(path)!r}, fps=8)["pixel_values_videos"]
            print(peak() - before - floats.nbytes // 2**20)
        """
        done = subprocess.run([sys.executable, "-c", inspect.cleandoc(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 180  # MB, besides 918 of floats; there are 230 of pixels

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 41), st.integers(1, 30), st.integers(1, 12))
    def test_parts_and_chunks_of_any_size_give_the_same(self, processor, long_clips, frames, part, chunk):
        path, numbers = long_clips(".mp4"), 3 * 56 * 84
        expected, _ = process(processor, path, num_frames=frames)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processing, "PART", part * numbers)
            patch.setattr(processing, "CHUNK", chunk * numbers)
            features, _ = process(processor, path, num_frames=frames)
        assert torch.equal(features["pixel_values_videos"], expected["pixel_values_videos"])
        assert torch.equal(features["video_grid_thw"], expected["video_grid_thw"])


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


class TestMessages:
    def test_a_video_of_a_message_may_have_settings_of_its_own(self, processor, clips):
        clip = str(clips / "clip.mp4")
        videos = [
            {"video": clip},
            {"path": clip, "fps": 1},
            {"url": clip, "num_frames": 6, "max_pixels": 112 * 112},
            {"video": clip, "start": 2, "end": 4},
            {"video": clip, "video_start": 2, "video_end": 4, "nframes": 4},
            {"video": clip, "frame_tokens": 4, "fps": None},
            {"video": clip, "max_tokens": 1280, "prefer": "frames"},
            {"video": pil_frames(4), "fps": 1},
            {"video": clip, "max_frames": 4, "min_pixels": 784},
            {"video": clip, "min_frames": 6, "max_tokens": 384, "text_tokens": 0, "fps": 0.1},
            {"video": clip, "block_size": 16, "max_tokens": 1280, "prefer": "frames", "on_error": "keep"},
        ]
        content = [{"type": "video", **video} for video in videos] + [{"type": "text", "text": "Hm?"}]
        conversation = [{"role": "user", "content": content}]
        template = functools.partial(
            processor.apply_chat_template, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs = template(conversation)
        grids = [[16, 16, 16], [4, 16, 16], [3, 8, 8], [4, 16, 16], [2, 16, 16], [16, 4, 4], [16, 8, 8], [2, 4, 4]]
        grids += [[2, 16, 16], [3, 16, 16], [16, 8, 8]]
        assert inputs["video_grid_thw"].tolist() == grids
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx(
            [0.5, 2, 8 / 3, 0.5, 1, 0.5, 0.5, 2, 4, 8 / 3, 0.5]
        )
        batch = template([conversation, conversation], processor_kwargs={"num_frames": 2})
        grids = [[1, 16, 16], [4, 16, 16], [3, 8, 8], [1, 16, 16], [2, 16, 16], [1, 4, 4], [1, 16, 16], [2, 4, 4]]
        grids += [[1, 16, 16], [3, 16, 16], [1, 16, 16]]
        assert batch["video_grid_thw"].tolist() == 2 * grids
        assert content[1] == {"type": "video", "path": clip, "fps": 1}  # the conversation is left as it is
        with pytest.raises(ValueError, match="`fps` or `num_frames`, not both"):
            template([{"role": "user", "content": [{"type": "video", "video": clip, "fps": 1, "num_frames": 4}]}])

    def test_settings_that_a_video_of_a_message_cannot_have_are_told(self, processor, clips, caplog):
        video = {"type": "video", "video": clips / "clip.mp4", "total_pixels": 10**6, "resized_height": 28}
        processor.apply_chat_template([{"role": "user", "content": [video]}] * 2, tokenize=False)
        assert caplog.text.count("cannot have resized_height, total_pixels of its own") == 1

    def test_text_alone_and_text_of_the_template_are_left_alone(self, processor):
        conversation = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": None}]
        assert "Hm?" in processor.apply_chat_template(conversation[:1], tokenize=False)


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


class TestErrors:
    def test_fps_and_num_frames_exclude_each_other(self, processor, clips):
        for call in (chat, process):
            with pytest.raises(ValueError, match="`fps` or `num_frames`, not both"):
                call(processor, clips / "clip.mp4", fps=2, num_frames=8)
        with pytest.raises(ValueError, match="not both"):
            chat(processor, clips / "clip.mp4", videos_kwargs={"fps": 2, "num_frames": 8})

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"fps": 0}, "fps must be a positive number, got 0"),
            ({"fps": -1.5}, "fps must be a positive number, got -1.5"),
            ({"fps": [2.0]}, "fps must be a positive number"),
            ({"num_frames": 0}, "num_frames must be a positive integer, got 0"),
            ({"num_frames": -2}, "num_frames must be a positive integer, got -2"),
            ({"num_frames": 65}, "num_frames=65 is more than the 64 frames"),
            ({"max_frames": 1}, "max_frames=1 cannot hold the 2 frames"),
            ({"start": "00:02"}, "start must be a number of seconds, got '00:02'"),
            ({"text_tokens": -1}, "text_tokens must be an integer of at least 0, got -1"),
        ],
    )
    def test_a_request_that_no_video_can_meet(self, processor, clips, request_, message):
        for call in (chat, process):
            with pytest.raises(ValueError, match=message):
                call(processor, clips / "clip.mp4", **request_)

    def test_what_a_file_cannot_give_names_the_file(self, processor, clips):
        for call in (chat, process, lambda processor, clip, **kwargs: processor.video_processor.plan(clip, **kwargs)):
            with pytest.raises(ValueError, match="/clip.mp4: start=9 and end=None leave nothing of a video of 8.000 s"):
                call(processor, clips / "clip.mp4", start=9)

    def test_images_that_cannot_be_read(self, processor, tmp_path, caplog):
        for i, frame in enumerate(pil_frames(8)):
            frame.save(tmp_path / f"{i}.png")
        data = (tmp_path / "3.png").read_bytes()
        for damaged in (b"", data[:60], b"no image"):
            for i in (0, 3):
                (tmp_path / f"{i}.png").write_bytes(damaged)
            with pytest.raises(ValueError, match="/0.png: cannot be read as an image: "):
                chat(processor, tmp_path)
            assert shown(processor, tmp_path, on_error="keep") == [1, 1, 2, 2, 4, 5, 6, 7]
            assert "3.png: cannot be read as an image" in caplog.text and "stand in" in caplog.text
        with pytest.raises(ValueError, match="3.png: cannot be read"):
            process(processor, [tmp_path / "3.png"] * 2, on_error="keep")
        Image.new("RGB", (64, 96)).save(tmp_path / "0.png")
        (tmp_path / "3.png").unlink()
        with pytest.raises(ValueError, match=r"/1.png is \(3, 48, 64\), those before are \(3, 96, 64\)"):
            chat(processor, tmp_path)
        with pytest.raises(ValueError, match="/0.png: cannot be read as an image: 64 × 96 pixels, the limit is 6,000"):
            chat(processor, tmp_path, max_source_pixels=6000)

    def test_a_missing_file(self, processor, tmp_path):
        for video in (tmp_path / "missing.mp4", f"file://{tmp_path}/missing.mp4"):
            with pytest.raises(FileNotFoundError, match="missing.mp4: no such video file"):
                chat(processor, video)
        with pytest.raises(ValueError, match="missing.png"):
            chat(processor, [f"{tmp_path}/missing.png"])

    def test_files_that_are_no_videos(self, processor, tmp_path):
        (tmp_path / "text.mp4").write_text("This is not a video. " * 100)
        with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes(bytes(32_000))
        messages = {
            "text.mp4": "text.mp4: cannot be read as a video",
            "sound.wav": "sound.wav: no video stream, only audio",
            ".": "a directory, without images",
        }
        for name, message in messages.items():
            with pytest.raises(ValueError, match=message):
                chat(processor, tmp_path / name)

    def test_the_cover_of_a_song_is_not_its_video(self, processor, tmp_path):
        with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as output:
            song, cover = output.add_stream("aac", rate=16_000), output.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic.value
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            output.mux(cover.encode(picture) + cover.encode())
            for i in range(16):
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                sound.sample_rate, sound.pts = 16_000, 1024 * i
                output.mux(song.encode(sound))
            output.mux(song.encode())
        with pytest.raises(ValueError, match="song.m4a: no video stream, only audio"):
            chat(processor, tmp_path / "song.m4a")

    def test_how_files_are_read_can_be_set_in_the_call(self, processor, clips, tmp_path):
        tiny.make_clip(tmp_path / "clip.mkv", width=64, height=64)
        data = (tmp_path / "clip.mkv").read_bytes()
        (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 3 // 4])
        with pytest.raises(ValueError, match=r"cut.mkv: truncated after \d\.\d of 8\.0 s \(\d+ frames\)"):
            chat(processor, tmp_path / "cut.mkv")
        assert 8 < chat(processor, tmp_path / "cut.mkv", on_error="keep")["video_grid_thw"][0, 0] < 16
        for request, message in (
            ({"max_source_pixels": 1000}, "clip.mp4: 224 × 224 pixels in its header, the limit is 1,000"),
            ({"max_duration": 5.0}, "clip.mp4: 8 seconds long, the limit is 5"),
            ({"on_error": "skip"}, "on_error must be 'raise' or 'keep'"),
        ):
            with pytest.raises(ValueError, match=message):
                chat(processor, clips / "clip.mp4", **request)


class TestHub:
    def test_it_is_saved_and_loaded_with_its_settings(self, processor, tmp_path, clips):
        settings = {"fps": 2, "max_frames": 12, "size": {"shortest_edge": 784, "longest_edge": 112 * 112}}
        VideoNSAProcessor(
            processor.image_processor, processor.tokenizer, VideoNSAVideoProcessor(**settings), tiny.CHAT_TEMPLATE
        ).save_pretrained(tmp_path)
        assert (tmp_path / "processing_videonsa.py").read_text() == Path(processing.__file__).read_text()
        for load in (AutoProcessor, VideoNSAProcessor):
            loaded = load.from_pretrained(tmp_path, trust_remote_code=True)
            assert type(loaded).__name__ == "VideoNSAProcessor"
            assert type(loaded.video_processor).__name__ == "VideoNSAVideoProcessor"
            assert loaded.video_processor.max_frames == 12 and loaded.video_processor.cap_pixels_per_frame is False
            assert chat(loaded, clips / "clip.mp4")["video_grid_thw"].tolist() == [[6, 8, 8]]
        alone = AutoVideoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
        assert alone(clips / "clip.mp4", num_frames=2)["video_grid_thw"].tolist() == [[1, 8, 8]]

    def test_as_remote_code_it_needs_nothing_but_what_is_installed_with_it(self):
        for file in (
            processing.__file__,
            *map(Path(processing.__file__).with_name, ("video_planner.py", "video_reader.py")),
        ):
            check_imports(file)
        assert "qwen_vl_utils" not in get_imports(processing.__file__)


class TestQwenVlUtils:
    @pytest.fixture(autouse=True)
    def reader(self, monkeypatch):
        vision_process = pytest.importorskip("qwen_vl_utils.vision_process")
        monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", dict(vision_process.VIDEO_READER_BACKENDS))
        monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "torchvision")
        monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", None)
        sys.modules.pop("videonsa.qwen_vl_utils_reader", None)
        importlib.import_module("videonsa.qwen_vl_utils_reader")
        assert vision_process.FORCE_QWENVL_VIDEO_READER == "videonsa"
        self.fetch_video, self.readers = vision_process.fetch_video, vision_process.VIDEO_READER_BACKENDS
        self.read = vision_process.VIDEO_READER_BACKENDS["torchvision"]
        self.process_vision_info = vision_process.process_vision_info

    def test_the_complete_way_from_messages_to_model_inputs(self, processor, clips):
        video = {"type": "video", "video": f"file://{clips}/clip.mp4", "fps": 4, "min_pixels": 784, "max_pixels": 50176}
        messages = [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images, videos, video_kwargs = self.process_vision_info(
            messages, return_video_kwargs=True, return_video_metadata=True
        )
        videos, metadata = map(list, zip(*videos, strict=True))
        inputs = processor(
            text=text,
            images=images,
            videos=videos,
            video_metadata=metadata,
            do_resize=False,
            return_tensors="pt",
            **video_kwargs,
        )
        assert inputs["video_grid_thw"].tolist() == [[16, 16, 16]]
        assert inputs["second_per_grid_ts"].tolist() == [0.5]
        assert (inputs["input_ids"] == processor.video_token_id).sum() == 1024

    def test_a_part_of_a_video_comes_through_whole(self, processor, clips):
        video = {"type": "video", "video": f"{clips}/clip.mp4", "fps": 4, "video_start": 2, "video_end": 4}
        _, ((video, metadata),) = self.process_vision_info(
            [{"role": "user", "content": [video]}], return_video_metadata=True
        )
        inputs = chat(processor, video, video_metadata=[metadata], do_sample_frames=False, return_metadata=True)
        assert len(video) == 8 and inputs["video_grid_thw"][0, 0] == 4
        assert inputs["timestamps"] == [[2, 2.625, 3.125, 3.75]]

    @pytest.mark.parametrize(
        ("element", "first", "last", "count"),
        [
            ({"fps": 4}, 0, 63, 32),
            ({"nframes": 10}, 0, 63, 10),
            ({"fps": 4, "max_frames": 6}, 0, 63, 6),
            ({"fps": 0.1, "min_frames": 4}, 0, 63, 4),
            ({"fps": 4, "video_start": 2, "video_end": 4}, 16, 32, 8),
        ],
    )
    def test_its_elements_are_honoured(self, clips, element, first, last, count):
        video, metadata, fps = self.read({"video": str(clips / "clip.mp4"), **element})
        assert video.dtype == torch.uint8 and video.shape == (count, 3, 224, 224)
        assert (metadata["frames_indices"][0], metadata["frames_indices"][-1]) == (first, last)
        assert metadata["fps"] == 8 and metadata["total_num_frames"] == last - first + 1
        assert fps == pytest.approx(count / (last - first + 1) * 8)
        assert torch.equal(video, decode(clips / "clip.mp4")[metadata["frames_indices"]])

    @pytest.mark.parametrize(
        "element", [{"max_pixels": 40_000, "min_pixels": 784}, {"resized_height": 112, "resized_width": 140}, {}]
    )
    def test_frames_are_made_smaller_as_they_are_decoded(self, clips, element):
        element = {"video": str(clips / "clip.mp4"), "fps": 2, **element}
        small = self.fetch_video(element)

        def read_whole(element):
            _, metadata, fps = self.read(element)
            return decode(clips / "clip.mp4")[metadata["frames_indices"]], metadata, fps

        self.readers["torchvision"] = self.readers["videonsa"] = read_whole
        assert torch.equal(small, self.fetch_video(element))
        assert self.read(element)[0].shape[2:] == (small.shape[2:] if len(element) > 2 else (224, 224))
