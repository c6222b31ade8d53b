"""The package: `from videonsa import VideoNSAForConditionalGeneration`. Repositories on the Hub do without this file.

A class is imported when it is first asked for, so that `import videonsa.video_reader` does not load the model.
"""

import importlib
from pathlib import Path

MODULES = {
    "VideoChat": "video_chat",
    "VideoNSAConfig": "configuration_videonsa",
    "VideoNSAForConditionalGeneration": "modeling_videonsa",
    "VideoNSAModel": "modeling_videonsa",
    "VideoNSAProcessor": "processing_videonsa",
    "VideoNSAQwen3Config": "configuration_videonsa_qwen3",
    "VideoNSAQwen3ForConditionalGeneration": "modeling_videonsa_qwen3",
    "VideoNSAQwen3Model": "modeling_videonsa_qwen3",
    "VideoNSAQwen3Processor": "processing_videonsa",
    "VideoNSAQwen3TextConfig": "configuration_videonsa_qwen3",
    "VideoNSAQwen3TextModel": "modeling_videonsa_qwen3",
    "VideoNSATextConfig": "configuration_videonsa",
    "VideoNSATextModel": "modeling_videonsa",
    "VideoNSAVideoProcessor": "processing_videonsa",
}

# The names that the classes of each type of checkpoint begin with, stock ones among them.
BACKBONES = {
    "videonsa": "VideoNSA",
    "qwen2_5_vl": "VideoNSA",
    "videonsa_qwen3": "VideoNSAQwen3",
    "qwen3_vl": "VideoNSAQwen3",
}

__all__ = [*MODULES, "config_class", "model_class"]

# `videonsa.qwen_vl_utils_reader`, the name of earlier releases, is found in adapters/; it goes with the next one.
# pytest imports this file as a module without a path, too.
if "__path__" in globals():
    __path__.append(str(Path(__file__).parent / "adapters"))


def model_class(model_type: str) -> type:
    """The class with a language-model head that loads a checkpoint of this `model_type`, stock or ours.

    Raises:
        ValueError: it is of another backbone.
    """
    return _class_of(model_type, "ForConditionalGeneration")


def config_class(model_type: str) -> type:
    """The configuration of such a checkpoint; see `model_class`."""
    return _class_of(model_type, "Config")


def _class_of(model_type: str, kind: str) -> type:
    if model_type not in BACKBONES:
        raise ValueError(f"model_type must be one of {', '.join(BACKBONES)}, got {model_type!r}")
    return __getattr__(BACKBONES[model_type] + kind)


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
