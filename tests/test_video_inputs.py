"""The forms in which videos, frames, their metadata and conversations are given, and what is said of bad ones."""

import functools
import http.server
import io
import itertools
import threading
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from packaging import version
from PIL import Image
from videos import chat, encode, pil_frames, process, shown

from lib import tiny


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
            ({"fps": "fast"}, "fps must be a positive number, got .fast."),
            ({"fps": [1, 2]}, "fps must be a number, or a list with one for each of 1 videos, got 2"),
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
