"""Writes `app.py` as a Hugging Face Space."""

import importlib.metadata
import shutil
from pathlib import Path

from .card import requirements
from .conversion import copy_code
from .folders import check_new, new_folder
from .loading import EXAMPLES

SPACE = """\
---
title: VideoNSA
emoji: 🎞️
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
pinned: false
license: apache-2.0
short_description: Ask a long video, with Native Sparse Attention
---

# Ask a long video

[VideoNSA](https://arxiv.org/abs/2510.02295) is Qwen2.5-VL whose vision tokens attend through Native Sparse Attention.
This Space asks the tiny model that ships with the project, which knows coloured shapes only and runs on a CPU. For
another model, set the variable `MODEL` to its id (and choose a GPU); the code files of that repository are run. On
ZeroGPU, each question reads the video anew.
"""


def write_space(folder: str | Path) -> Path:
    """Write a folder to upload as a Space: the app, what scripts share, the tiny model, README.md and requirements.txt.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    folder = check_new(folder)
    with new_folder(folder) as partial_folder:
        shutil.copyfile(EXAMPLES / "app.py", partial_folder / "app.py")
        for name in ("lib", "tiny"):
            shutil.copytree(EXAMPLES / name, partial_folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (partial_folder / "videonsa").mkdir()
        copy_code(partial_folder / "videonsa")
        shutil.copyfile(EXAMPLES.parent / "__init__.py", partial_folder / "videonsa/__init__.py")
        shutil.copyfile(EXAMPLES.parent / "LICENSE", partial_folder / "LICENSE")
        (partial_folder / "README.md").write_text(SPACE.format(gradio=importlib.metadata.version("gradio")))
        # The Space installs Gradio itself, by `sdk_version`.
        lines = sorted(need for need in requirements("app") if not need.startswith("gradio"))
        (partial_folder / "requirements.txt").write_text("\n".join(lines) + "\n")
    return folder
