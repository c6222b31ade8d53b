"""Folders that appear only when complete, as the scripts write them, and names of folders that models are read from."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The trained tiny model, a complete repository. `--model tiny` names it from everywhere.
TINY = str(Path(__file__).resolve().parents[1] / "tiny")


def check_source(argument: str, source: str | Path) -> str:
    """The folder, or what may be the id of a Hub repository, that an argument names; `tiny` stands for `TINY`.

    Raises:
        FileNotFoundError: it is neither, which is told before a download is tried.
    """
    if Path(source).is_dir() or HUB_ID.fullmatch(str(source)):
        return str(source)
    if str(source) == "tiny":
        return TINY
    raise FileNotFoundError(f"{argument} {source} is no folder, nor a Hub id, which is OWNER/NAME")


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
