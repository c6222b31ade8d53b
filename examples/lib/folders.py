"""Folders that appear only when complete, as the scripts write them, and names of folders that models are read from."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_source(argument: str, source: str | Path) -> None:
    """Check that an argument names a folder or may be the id of a Hub repository, before a download is tried.

    Raises:
        FileNotFoundError: it is neither.
    """
    if not Path(source).is_dir() and not HUB_ID.fullmatch(str(source)):
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


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to: it takes that place at the end, and goes if anything is raised."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
