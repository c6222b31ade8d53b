"""`qwen_vl_utils` reads by `VideoFile`, and its results are taken as they are."""

import importlib
import sys

import pytest
import torch
from videos import chat, decode


class TestQwenVlUtils:
    @pytest.fixture(autouse=True)
    def reader(self, monkeypatch):
        vision_process = pytest.importorskip("qwen_vl_utils.vision_process")
        monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", dict(vision_process.VIDEO_READER_BACKENDS))
        monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "torchvision")
        monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", None)
        sys.modules.pop("videonsa.adapters.qwen_vl_utils_reader", None)
        importlib.import_module("videonsa.adapters.qwen_vl_utils_reader")
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

    def test_the_name_of_earlier_releases_is_imported(self):
        self.readers.clear()
        sys.modules.pop("videonsa.qwen_vl_utils_reader", None)
        importlib.import_module("videonsa.qwen_vl_utils_reader")
        assert "videonsa" in self.readers
