"""Folders that appear only when complete, as the scripts write them, and names of folders that models are read from."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# One of them is in the folder of a model.
CONFIGS = ("config.json", "adapter_config.json")
# The trained tiny model, a complete repository. `--model tiny` names it from everywhere.
TINY = str(Path(__file__).resolve().parents[1] / "tiny")


def check_source(argument: str, source: str | Path) -> str:
    """The folder, or what may be the id of a Hub repository, that an argument names; `tiny` stands for `TINY`.

    Raises:
        FileNotFoundError: it is neither, which is told before a download is tried; or the folder of a training that
            was stopped.
    """
    if (newest := newest_checkpoint(Path(source))) and not any((Path(source) / name).is_file() for name in CONFIGS):
        raise FileNotFoundError(f"{argument} {source} holds no finished model: resume the training, or name {newest}")
    if Path(source).is_dir() or HUB_ID.fullmatch(str(source)):
        return str(source)
    if str(source) == "tiny":
        return TINY
    raise FileNotFoundError(f"{argument} {source} is no folder, nor a Hub id, which is OWNER/NAME")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of most steps in the output folder of a training."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return max((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), default=None)


def check_new(output: str | Path) -> Path:
    """The absolute path of a folder to make.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    output = Path(output).resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"output {output} exists already; name a new folder")
    return output


def share(folder: Path) -> int:
    """Give the weights in a folder the mode of new files, and return the umask. safetensors makes them private."""
    mask = os.umask(0o022)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)
    return mask


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to: it takes that place at the end, and goes if anything is raised."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield partial
        mask = share(partial)
        partial.chmod(0o777 & ~mask)  # mkdtemp makes it private
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
