"""A processor is saved and loaded as on the Hub."""

import json
import logging
from pathlib import Path

import pytest
from transformers import AutoProcessor, AutoVideoProcessor
from transformers.dynamic_module_utils import check_imports, get_imports
from videos import chat

import videonsa.processing_videonsa as processing
from lib import tiny
from videonsa.processing_videonsa import VideoNSAProcessor, VideoNSAQwen3Processor, VideoNSAVideoProcessor


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

    @pytest.mark.parametrize(
        ("repository", "own"), [("tiny_repository", VideoNSAProcessor), ("qwen3_repository", VideoNSAQwen3Processor)]
    )
    def test_saving_it_again_changes_nothing(self, request, tmp_path, repository, own):
        built = own.from_pretrained(request.getfixturevalue(repository))
        described = built.to_dict(), repr(built.image_processor), repr(built.video_processor)
        built.save_pretrained(tmp_path / "first")
        assert described == (built.to_dict(), repr(built.image_processor), repr(built.video_processor))
        for load, folder in ((own, "first"), (AutoProcessor, "second"), (AutoProcessor, "third")):
            loaded = load.from_pretrained(tmp_path / folder, trust_remote_code=True)
            again = tmp_path / {"first": "second", "second": "third", "third": "fourth"}[folder]
            loaded.save_pretrained(again)
            assert loaded.to_dict() == described[0]
            for path in (tmp_path / "first").iterdir():
                assert (again / path.name).read_bytes() == path.read_bytes(), path.name
        saved = json.loads((tmp_path / "fourth/processor_config.json").read_text())
        assert saved["processor_class"] == own.__name__
        assert saved["auto_map"] == {"AutoProcessor": f"processing_videonsa.{own.__name__}"}
        assert saved["video_processor"]["auto_map"] == {
            "AutoVideoProcessor": "processing_videonsa.VideoNSAVideoProcessor"
        }

    def test_a_folder_without_the_code_of_its_model_is_read_without_a_warning(self, tiny_repository, tmp_path, caplog):
        VideoNSAProcessor.from_pretrained(tiny_repository).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes((tiny_repository / "config.json").read_bytes())  # as in an adapter
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
        VideoNSAProcessor.from_pretrained(tmp_path)
        logger.removeHandler(caplog.handler)
        assert "You are using a model of type" not in caplog.text

    def test_the_installed_package_runs_no_code_of_a_folder_and_does_not_ask_to(self, tiny_repository, monkeypatch):
        def asked(*_):
            raise AssertionError("asked to trust remote code")

        monkeypatch.setattr("builtins.input", asked)
        for load in (VideoNSAProcessor, VideoNSAVideoProcessor):
            for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
                loaded = load.from_pretrained(tiny_repository, **trust)
                assert type(loaded) is load
                video_processor = getattr(loaded, "video_processor", loaded)
                assert type(video_processor) is VideoNSAVideoProcessor
                assert "trust_remote_code" not in video_processor.to_dict()

    def test_as_remote_code_it_needs_nothing_but_what_is_installed_with_it(self):
        here = Path(processing.__file__)
        for file in (here, *here.parent.glob("video_*.py")):
            check_imports(file)
        assert "qwen_vl_utils" not in get_imports(processing.__file__)
