"""The package `videonsa` as programs import it after `pip install`."""

import subprocess
import sys
from pathlib import Path

import pytest

import videonsa

ROOT = Path(__file__).resolve().parents[1]


def test_every_class_is_imported_from_the_package_when_it_is_asked_for():
    for name in videonsa.__all__:
        assert getattr(videonsa, name).__name__ == name
        assert name in dir(videonsa)
    from videonsa import VideoNSAForConditionalGeneration
    from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration as ours

    assert VideoNSAForConditionalGeneration is ours
    with pytest.raises(AttributeError, match="'videonsa' has no attribute 'VideoNSA'"):
        videonsa.VideoNSA  # noqa: B018


def test_importing_the_package_loads_no_model(tmp_path):
    (tmp_path / "videonsa").symlink_to(ROOT)
    program = "import sys, videonsa; print(sorted(sys.modules.keys() & {'torch', 'transformers'}), videonsa.__file__)"
    # Not `run_fresh`, whose processes begin with both.
    printed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True).stdout
    assert printed.split() == ["[]", str(tmp_path / "videonsa/__init__.py")]


def test_the_model_is_imported_in_a_fresh_process(run_fresh, tmp_path):
    (tmp_path / "videonsa").symlink_to(ROOT)
    program = (
        "from videonsa import VideoNSAConfig, VideoNSAProcessor; print(VideoNSAProcessor, VideoNSAConfig.model_type)"
    )
    assert "videonsa.processing_videonsa.VideoNSAProcessor" in run_fresh(program)
