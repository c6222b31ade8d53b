"""Makes the flat files at the repository root importable as the package `videonsa`, ahead of any installed copy, and
gives tests a miniature stock checkpoint and fresh processes."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.machinery.ModuleSpec("videonsa", None, is_package=True)
spec.submodule_search_locations = [str(ROOT)]
sys.modules["videonsa"] = importlib.util.module_from_spec(spec)
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="session")
def stock_checkpoint(tmp_path_factory):
    """Folder of a stock Qwen2.5-VL repository with random weights: 2 layers, 7 query heads, 1 KV head."""
    from tiny import make_stock_checkpoint

    shape = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("stock")
    return make_stock_checkpoint(folder, num_hidden_layers=2, vision_hidden_size=32, **shape)


@pytest.fixture
def run_fresh(tmp_path):
    """Runs a program as a user would who has only a model folder: a new process somewhere else, an empty cache of
    remote code, and this repository nowhere on the path. Returns what it printed."""

    def run(program: str, *args) -> str:
        cache = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "home" / "modules")}
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, args)],
            cwd=tmp_path,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **cache, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
