"""Videos are taken for what they are: pictures that move, lists of paths, data URLs, numbers of any kind."""

import base64
import functools
import http.server
import io
import re
import threading

import numpy as np
import pytest
import torch
from corpus import numbers_of, picture
from PIL import Image
from videos import chat, encode, pil_frames, process, shown

from videonsa import video_source

TIMES = [0, 0.25, 0.5, 1.5, 1.75, 2.0]
LENGTHS = [250, 250, 1000, 250, 250, 500]


@pytest.fixture
def moving(tmp_path):
    """Writes an animated picture of a format, whose frames carry their numbers; returns its path."""

    def make(suffix, name="moving", size=(128, 64)):
        images = [Image.fromarray(picture(i, *size)) for i in range(6)]
        options = {"webp": {"lossless": True}}.get(suffix, {}) | ({} if suffix == "tiff" else {"duration": LENGTHS})
        images[0].save(tmp_path / f"{name}.{suffix}", format=suffix, save_all=True, append_images=images[1:], **options)
        return tmp_path / f"{name}.{suffix}"

    return make


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of the folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def ask(processor, *videos, **kwargs):
    """Model inputs of a conversation with these videos, which may be the whole item of a message."""
    items = [video if isinstance(video, dict) else {"type": "video", "video": video} for video in videos]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*items, {"type": "text", "text": "Hm?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, **kwargs},
    )


def numbers(processor, video, **kwargs) -> list[int]:
    """What the frames that the model gets to see say, by a message."""
    inputs = ask(processor, video, do_rescale=False, do_normalize=False, **kwargs)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    patches = inputs["pixel_values_videos"].float().view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    return numbers_of(patches.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(2 * t, 3, 14 * h, 14 * w))


class TestMovingPictures:
    @pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
    def test_they_are_videos_with_times_of_their_own(self, processor, moving, suffix):
        path = moving(suffix)
        for video in (path, str(path), [path], path.read_bytes(), io.BytesIO(path.read_bytes())):
            _, metadata = process(processor, video, do_sample_frames=False)
            assert metadata.frame_times == pytest.approx(TIMES, abs=2e-3)
            assert metadata.duration == pytest.approx(2.5, abs=2e-3)
        assert numbers(processor, str(path), do_sample_frames=False) == list(range(6))
        assert numbers(processor, str(path), fps=4) == [0, 1, 2, 2, 3, 5]
        assert processor.video_processor.plan(path, fps=4).num_frames == 6

    def test_whatever_they_are_called(self, processor, moving, tmp_path):
        for suffix in ("webp", "png"):
            data = moving(suffix).read_bytes()
            for name in ("clip", "clip.jpg", "clip.mp4"):
                (tmp_path / name).write_bytes(data)
                assert numbers(processor, str(tmp_path / name), do_sample_frames=False) == list(range(6))

    def test_tiff_says_nothing_of_time(self, processor, moving, tmp_path):
        assert numbers(processor, str(moving("tiff")), fps=1) == list(range(6))
        inputs = ask(processor, {"type": "video", "video": str(moving("tiff")), "fps": 1})
        assert inputs["timestamps"] == [[0, 2, 4]]
        preview = Image.new("RGB", (64, 32))
        Image.fromarray(picture(3)).save(tmp_path / "photo.tiff", save_all=True, append_images=[preview])
        assert set(numbers(processor, str(tmp_path / "photo.tiff"))) == {3}

    def test_those_on_a_server_are_too(self, processor, moving, server):
        for suffix in ("png", "webp"):
            name = moving(suffix).name
            assert numbers(processor, f"{server}/{name}?token=1", do_sample_frames=False) == list(range(6))

    def test_several_are_several_videos(self, processor, moving):
        paths = [moving("webp", "a"), moving("webp", "b")]
        inputs = processor(text="<|video_pad|><|video_pad|>", videos=paths, return_tensors="pt")
        assert len(inputs["video_grid_thw"]) == 2

    def test_they_are_within_the_limits(self, processor, moving):
        for request, message in (
            ({"max_source_pixels": 1000}, "moving.webp: 128 × 64 pixels, the limit is 1,000"),
            ({"max_duration": 2}, "moving.webp: 2 seconds long, the limit is 2"),
            ({"start": 3}, "moving.webp: start=3 and end=None leave nothing of a video of 2.500 s"),
        ):
            with pytest.raises(ValueError, match=message):
                process(processor, moving("webp"), **request)

    def test_damaged_ones_are_named(self, processor, moving):
        path = moving("webp")
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(ValueError, match="moving.webp: "):
            process(processor, path)


class TestPathsOfFrames:
    NAMES = ("%d.jpg", "%d.jfif", "%d", "%d.ppm", "%d.avif", "%d.tga", "%d.jp2")

    def save(self, folder, name):
        formats = {"": "JPEG", "jfif": "JPEG", "jpg": "JPEG", "jp2": "JPEG2000"}
        suffix = name.partition(".")[2]
        for i in range(4):
            Image.fromarray(picture(i, 256, 128)).save(folder / (name % i), format=formats.get(suffix))

    @pytest.mark.parametrize("name", NAMES)
    def test_they_are_one_video(self, processor, tmp_path, server, name):
        self.save(tmp_path, name)
        paths = [str(tmp_path / (name % i)) for i in range(4)]
        for form in (paths, [f"file://{path}" for path in paths], [tmp_path / (name % i) for i in range(4)]):
            assert numbers(processor, form) == [0, 1, 2, 3]
            assert processor.video_processor.plan(form).num_frames == 4
        assert process(processor, paths)[0]["video_grid_thw"][0, 0] == 2
        for query in ("", "?Expires=1&Signature=a.b", "?name=clip.mp4"):
            assert numbers(processor, [f"{server}/{name % i}{query}" for i in range(4)]) == [0, 1, 2, 3]
        inputs = ask(processor, {"type": "video", "video": paths, "sample_fps": 1})
        assert inputs["timestamps"] == [[0, 2]]

    def test_a_folder_may_hold_any_of_them(self, processor, tmp_path):
        (tmp_path / "frames").mkdir()
        self.save(tmp_path / "frames", "%d")
        (tmp_path / "frames/notes.txt").write_text("none")
        assert numbers(processor, str(tmp_path / "frames")) == [0, 1, 2, 3]

    def test_paths_of_videos_stay_videos(self, processor, clips):
        clip = str(clips / "clip.mp4")
        assert ask(processor, [clip], clip)["video_grid_thw"].tolist() == [[16, 16, 16]] * 2
        inputs = processor(text="<|video_pad|><|video_pad|>", videos=[clip, clip], return_tensors="pt")
        assert len(inputs["video_grid_thw"]) == 2


class TestRates:
    @pytest.mark.parametrize("form", ["list", "paths", "folder", "array"])
    @pytest.mark.parametrize(
        ("keys", "step"),
        [
            ({"sample_fps": 1.0}, 2),
            ({"sample_fps": "1"}, 2),
            ({"sample_fps": 2.0, "raw_fps": 30}, 1),
            ({"raw_fps": 4}, 0.5),
            ({"fps": "1"}, 2),
            ({"fps": 8, "sample_fps": 1}, 2),
        ],
    )
    def test_those_of_a_list_of_frames_are_taken(self, processor, tmp_path, form, keys, step):
        frames = pil_frames(6)
        for i, frame in enumerate(frames):
            frame.save(tmp_path / f"{i}.png")
        video = {
            "list": frames,
            "paths": [str(tmp_path / f"{i}.png") for i in range(6)],
            "folder": str(tmp_path),
            "array": np.stack([np.asarray(frame) for frame in frames]),
        }[form]
        inputs = ask(processor, {"type": "video", "video": video, **keys})
        assert inputs["timestamps"] == [[0, step, 2 * step]]
        assert inputs["second_per_grid_ts"].tolist() == [step]

    def test_those_of_a_file_are_told_to_be_left_out(self, processor, clips, caplog):
        inputs = ask(processor, {"type": "video", "video": clips / "clip.mp4", "sample_fps": 1, "raw_fps": 2})
        assert inputs["video_grid_thw"][0, 0] == 16
        assert "cannot have raw_fps, sample_fps of its own" in caplog.text

    def test_frames_numbered_anew_are_spaced_evenly(self, processor):
        metadata = {"fps": 30, "frames_indices": list(range(12)), "total_num_frames": 180.0}
        request = {"video_metadata": [metadata], "do_sample_frames": False}
        inputs = chat(processor, pil_frames(12), **request, return_metadata=True)
        assert inputs["second_per_grid_ts"].tolist() == [1]
        assert inputs["timestamps"] == [[0, 1, 2, 3, 4, 5]]

    @pytest.mark.parametrize("given", [[1.0], "1", (1,), np.array([1.0]), torch.tensor([1.0]), ["1"], np.float32(1)])
    def test_numbers_may_be_texts_or_one_for_each_video(self, processor, given):
        for options in ({"fps": given}, {"videos_kwargs": {"fps": given}}):
            assert chat(processor, pil_frames(4), **options)["second_per_grid_ts"].tolist() == [2]
        assert process(processor, pil_frames(4), fps=given)[1].fps == 1

    def test_each_video_gets_its_own(self, processor, clips):
        clip = str(clips / "clip.mp4")
        inputs = ask(processor, clip, pil_frames(4), fps=[1, 2.0])
        assert inputs["video_grid_thw"][:, 0].tolist() == [4, 2]
        assert inputs["second_per_grid_ts"].tolist() == [2, 1]
        inputs = ask(processor, {"type": "video", "video": clip, "num_frames": "6"}, clip, fps=[1, "2"])
        assert inputs["video_grid_thw"][:, 0].tolist() == [3, 8]
        features = processor.video_processor([clip, clip], num_frames=["2", 4])
        assert features["video_grid_thw"][:, 0].tolist() == [1, 2]
        with pytest.raises(ValueError, match="fps must be a number, or a list with one for each of 1 videos, got 2"):
            ask(processor, clip, fps=[1, 2])
        assert ask(processor, fps=[])["input_ids"].shape[0] == 1


class TestPixels:
    def mean(self, processor, video, **kwargs):
        features, _ = process(processor, video, do_normalize=False, do_rescale=True, **kwargs)
        return round(255 * float(features["pixel_values_videos"].mean()))

    def test_what_is_transparent_is_white(self, processor, tmp_path):
        clear = np.zeros((4, 56, 56, 4), np.uint8)
        images = [Image.fromarray(frame) for frame in clear]
        grey = [Image.fromarray(frame[..., 2:]) for frame in clear]
        palette = [image.convert("P") for image in images]
        for i, image in enumerate(images):
            image.save(tmp_path / f"{i}.png")
        images[0].save(tmp_path / "moving.webp", save_all=True, append_images=images[1:], lossless=True)
        for image in palette:
            image.info["transparency"] = 0
        paths = [tmp_path / f"{i}.png" for i in range(4)]
        for video in (clear, images, grey, palette, paths, tmp_path / "moving.webp", [str(path) for path in paths]):
            assert self.mean(processor, video) == 255
        half = clear.copy()
        half[..., 3] = 128
        assert self.mean(processor, [Image.fromarray(frame) for frame in half]) == self.mean(processor, half) == 127

    def test_views_from_opencv_are_copied(self, processor):
        frames = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), np.uint8)
        expected, _ = process(processor, frames[..., ::-1].copy())
        for video in (frames[..., ::-1], [frame[..., ::-1] for frame in frames], list(frames[..., ::-1])):
            assert torch.equal(process(processor, video)[0]["pixel_values_videos"], expected["pixel_values_videos"])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, torch.float32, torch.bfloat16])
    def test_floats_from_0_to_1_are_scaled(self, processor, dtype):
        grey = np.full((4, 56, 56, 3), 0.5)
        grey[0, 0, 0], grey[0, 0, 1] = 0, 1
        for scale in (1, 255):
            video = scale * grey
            video = torch.from_numpy(video).to(dtype) if isinstance(dtype, torch.dtype) else video.astype(dtype)
            for form in (video, list(video)):
                assert abs(self.mean(processor, form) - 127.5) <= 1.5

    def test_booleans_are_black_and_white(self, processor):
        assert self.mean(processor, np.ones((4, 56, 56, 3), bool)) == 255
        assert self.mean(processor, torch.ones(4, 3, 56, 56, dtype=torch.bool)) == 255

    @pytest.mark.parametrize(
        ("frames", "message"),
        [
            (np.zeros((4, 56, 56, 3), np.uint16), "got uint16; do_rescale=False takes them as they are"),
            (np.full((4, 56, 56, 3), 300, np.int64), "got int64 from 300 to 300"),
            (np.linspace(-2, 2, 4 * 56 * 56 * 3).reshape(4, 56, 56, 3), "got float64 from -2 to 2"),
            (np.full((4, 56, 56, 3), np.nan), "got float64"),
            ([np.zeros((56, 56, 3), np.uint8), np.zeros((56, 56, 3), np.float32)], "several types: float32, uint8"),
            ([Image.new("F", (56, 56))] * 2, "mode F"),
        ],
    )
    def test_numbers_that_may_mean_anything_are_refused(self, processor, frames, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            process(processor, frames)

    def test_images_of_16_bits_are_scaled(self, processor, tmp_path):
        Image.fromarray(np.full((56, 56), 32_768, np.uint16)).save(tmp_path / "0.png")
        assert self.mean(processor, [tmp_path / "0.png"] * 2) == 128


class TestDataUrls:
    def test_they_are_decoded(self, processor, tmp_path, moving):
        path = encode(tmp_path / "clip.mp4")
        text = base64.b64encode(path.read_bytes()).decode()
        lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
        safe = base64.urlsafe_b64encode(path.read_bytes()).decode().rstrip("=")
        for data in (text, lines, safe, text.replace("+", "%2B").replace("/", "%2F")):
            for head in ("data:video/mp4;base64", "data:;base64", "DATA:video/mp4;codecs=avc1;BASE64"):
                assert shown(processor, f"{head},{data}") == list(range(0, 32, 2))
        assert ask(processor, f"data:video/mp4;base64,{text}")["video_grid_thw"].tolist() == [[8, 4, 4]]
        for suffix in ("webp", "png", "gif"):
            data = base64.b64encode(moving(suffix).read_bytes()).decode()
            url = f"data:image/{suffix};base64,{data}"
            assert numbers(processor, url, do_sample_frames=False) == list(range(6))

    def test_frames_may_be_some(self, processor):
        urls = []
        for i in range(4):
            file = io.BytesIO()
            Image.fromarray(picture(i, 256, 128)).save(file, "PNG")
            urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        assert numbers(processor, urls) == [0, 1, 2, 3]

    def test_bad_ones_are_named_in_short(self, processor, monkeypatch):
        noise = base64.b64encode(np.random.default_rng(0).bytes(30_000)).decode()
        for url, message in (
            (f"data:video/mp4;base64,{noise}", "<data:video/mp4;base64>: cannot be read as a video"),
            (f"data:video/mp4;base64,{noise}!", "<data:video/mp4;base64>: no valid base64"),
            ("data:video/mp4;base64,", "<data:video/mp4;base64>: empty"),
            (f"data:{noise}", "<data:.*>: empty"),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                ask(processor, url)
            assert len(str(caught.value)) < 400
        monkeypatch.setattr(video_source, "MAX_DOWNLOAD", 1000)
        with pytest.raises(ValueError, match="<data:video/mp4;base64>: more than 1,000 bytes, the limit"):
            ask(processor, f"data:video/mp4;base64,{noise}")


class TestErrors:
    def test_none_quotes_more_than_a_little_of_an_input(self, processor, clips, tmp_path):
        long = "x" * 100_000
        name = tmp_path / ("y" * 240 + ".mp4")
        name.write_bytes(b"no video" * 100)
        for video, options in (
            (long, {}),
            (f"/{long}.mp4", {}),
            (f"http://127.0.0.1:1/{long}.mp4", {}),
            (f"file:///{long}", {}),
            (str(name), {}),
            ([f"{long}.png"] * 2, {}),
            (["data:image/png;base64," + long] * 2, {}),
            (clips / "clip.mp4", {"fps": long}),
            (clips / "clip.mp4", {"num_frames": long}),
            (clips / "clip.mp4", {"start": long}),
            (clips / "clip.mp4", {"prefer": long}),
            (clips / "clip.mp4", {"on_error": long}),
        ):
            with pytest.raises((ValueError, OSError)) as caught:
                process(processor, video, **options)
            assert len(str(caught.value)) < 600, str(caught.value)[:300]
        with pytest.raises(TypeError) as caught:
            processor.video_processor.plan(clips / "clip.mp4", **{long: 1})
        assert len(str(caught.value)) < 300

    def test_no_videos_at_all(self, processor):
        for videos in ([], [[]], ()):
            with pytest.raises(ValueError, match="`videos` holds no video; without any, leave it out"):
                processor(text="Hm?", videos=videos, return_tensors="pt")
