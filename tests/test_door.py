"""How scripts end: a user's mistake by one line, what nobody expected by its traceback."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from lib.card import requirements
from lib.door import EXTRAS, door, explain
from lib.folders import TINY
from lib.loading import load

ROOT = Path(__file__).resolve().parents[1]


def scripts() -> list[Path]:
    """What a user starts; readers.py is started by video.py alone, and the others are no scripts."""
    found = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    return [path for path in found if path.name not in ("arithmetic.py", "common.py", "readers.py")]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_every_script_has_the_door_and_no_other_way_out(path):
    text = path.read_text()
    assert "@door\ndef main() -> None:" in text or "door(main)()" in text
    handlers = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler)]
    assert not [ast.unparse(node) for node in handlers if "sys.exit(f" in ast.unparse(node)]


def end(error: BaseException):
    """How a script ends that raises an error."""

    @door
    def main() -> None:
        raise error

    with pytest.raises(BaseException) as stopped:
        main()
    return stopped.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--fps must be positive,\n got -1"), "--fps must be positive, got -1"),
        (FileNotFoundError(2, "No such file", "a.mp4"), "[Errno 2] No such file: 'a.mp4'"),
        (OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled"),
        (httpx.ConnectError("Name or service not known"), "no connection (Name or service not known): check the"),
        (safetensors.SafetensorError("incomplete metadata"), "incomplete metadata"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 'needs peft: pip install -e ".[train]"'),
        (RuntimeError("WandbCallback requires wandb to be installed."), "WandbCallback requires wandb"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory: a smaller --max_tokens"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(error, line):
    stopped = end(error)
    assert isinstance(stopped, SystemExit) and str(stopped).startswith(f"test_door.py: {line}")
    assert "\n" not in str(stopped)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("shapes"), AssertionError(), ModuleNotFoundError("No", name="videonsa_old")],
)
def test_a_bug_keeps_its_traceback(error):
    assert end(error) is error


def test_a_value_error_out_of_torch_is_a_bug():
    @door
    def main() -> None:
        torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))

    with pytest.raises(ValueError, match="batch_size"):
        main()


def test_ctrl_c_is_one_line(capsys):
    stopped = end(KeyboardInterrupt())
    assert stopped.code == 130 and capsys.readouterr().err == "\ntest_door.py: interrupted\n"


def test_every_extra_that_is_named_installs_its_package():
    names = {"yaml": "pyyaml", "PIL": "pillow", "qwen_vl_utils": "qwen-vl-utils", "lmms_eval": "lmms-eval"}
    for package, extra in EXTRAS.items():
        if package in ("videonsa", "numpy"):
            continue
        assert any(line.startswith(names.get(package, package)) for line in requirements(extra)), package


def test_scripts_import_what_an_extra_installs():
    """And nothing that comes with another package, which may take another tomorrow. Triton comes with torch."""
    own = {path.stem for folder in ("benchmarks", "examples") for path in (ROOT / folder).iterdir()}
    known = own | set(EXTRAS) | sys.stdlib_module_names | {"triton"}
    for path in scripts():
        for node in ast.parse(path.read_text()).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= known, path


@pytest.mark.parametrize("script", ["examples/demo.py", "examples/finetune.py", "benchmarks/plot.py"])
def test_a_package_that_is_missing_is_named_at_the_imports(script):
    hide = f"import sys; sys.modules.update(torch=None, matplotlib=None); sys.argv = [{script!r}]; import runpy; "
    program = f"{hide}sys.path.insert(0, {str(ROOT / Path(script).parent)!r}); runpy.run_path({script!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    # transformers says, too, that it finds no torch.
    assert done.stderr.splitlines()[-1] == f'{Path(script).name}: needs torch: pip install -e ".[demo]"'
    assert "Traceback" not in done.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors", "nsa_checks.py"]
)
def test_a_damaged_file_of_a_model_is_one_line_that_names_the_model(name, tmp_path, monkeypatch, needles):
    model = shutil.copytree(TINY, tmp_path / f"model-{name.replace('.', '-')}")
    cut(model / name)
    data = str(needles / "test.json")
    for script, options in (
        ("evaluate", [model, data, tmp_path / "out.json"]),
        ("finetune", ["--model", model, "--train_data", data, "--output_dir", tmp_path / "out", "--dry_run"]),
    ):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(script).main()
        line = str(stopped.value)
        assert line.startswith(f"{script}.py: ") and str(model) in line and "\n" not in line


def test_weights_of_other_shapes_and_a_gpu_that_is_not_there_are_one_line(tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    config = model / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 224', '"hidden_size": 448'))
    with pytest.raises(ValueError, match="its weights have other shapes than its config.json"):
        load(str(model), "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here"):
            load(str(model), "cuda")


def test_explain_knows_no_error_of_no_kind():
    assert explain(Exception("x")) is None
