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
    "VideoNSATextConfig": "configuration_videonsa",
    "VideoNSATextModel": "modeling_videonsa",
    "VideoNSAVideoProcessor": "processing_videonsa",
}

__all__ = list(MODULES)

# `videonsa.qwen_vl_utils_reader`, the name of earlier releases, is found in adapters/; it goes with the next one.
# pytest imports this file as a module without a path, too.
if "__path__" in globals():
    __path__.append(str(Path(__file__).parent / "adapters"))


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
