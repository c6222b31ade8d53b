"""Write Native Sparse Attention as a kernel for the Hub, which needs neither this package nor transformers.

    python examples/export_kernel.py nsa-kernel
    python examples/export_kernel.py nsa-kernel --repo_id me/native-sparse-attention    # as its card calls it

Programs load the folder by `kernels.get_local_kernel`, and what is uploaded of it by `kernels.get_kernel`: see
docs/kernels.md. It holds the code for each backend in `build`, a card, a benchmark and a test.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import ast
import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from lib.card import requirements
from lib.folders import HUB_ID, check_new, new_folder
from lib.options import OptionParser

NAME = "native-sparse-attention"
VERSION = 0  # of the functions; 0 is for kernels that may still change
BACKENDS = ("cpu", "cuda")  # what torch is built for: a build for CUDA takes the second one on a CPU, too
ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "examples" / "hub_kernel"  # what is of the kernel alone


def export(output: str | Path, repo_id: str = f"OWNER/{NAME}") -> Path:
    """Write the kernel to the folder `output` and return it.

    Args:
        output: folder to make; it appears only when complete.
        repo_id: of the Hub repository, for the card.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        ValueError: `repo_id` is not OWNER/NAME.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"--repo_id must be OWNER/NAME, got {repo_id}")
    output = check_new(output)
    files = code_files()
    with new_folder(output) as folder:
        for backend in BACKENDS:
            variant = folder / "build" / f"torch-{backend}"
            variant.mkdir(parents=True)
            for path in files:
                shutil.copyfile(path, variant / path.name)
            (variant / "metadata.json").write_text(json.dumps(metadata(files, backend), indent=2) + "\n")
        for part, place in (("benchmark.py", "benchmarks"), (f"test_{NAME.replace('-', '_')}.py", "tests")):
            (folder / place).mkdir()
            shutil.copyfile(PARTS / part, folder / place / part)
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
        (torch,) = (f'"{need}"' for need in requirements() if need.startswith("torch>"))
        card = (PARTS / "CARD.md").read_text().format(repo_id=repo_id, version=VERSION, torch=torch)
        (folder / "README.md").write_text(card)
    return output


def code_files() -> list[Path]:
    """`__init__.py` of the kernel, and all files at the root that it imports."""
    found, todo = {}, [PARTS / "__init__.py"]
    while todo:
        path = todo.pop()
        if path.name not in found:
            found[path.name] = path
            todo += [ROOT / f"{name}.py" for name in relative_imports(path)]
    return [found[name] for name in sorted(found)]


def relative_imports(path: Path) -> Iterator[str]:
    """The modules of `from .module import x` and `from . import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def metadata(files: list[Path], backend: str) -> dict:
    """metadata.json, as the page "Kernel requirements" of `kernels` describes it. `id` is the name of the module and of
    its operators; it changes with the code, so that two versions do not meet."""
    contents = {path.name: path.read_bytes() for path in files}
    code = hashlib.sha256(b"".join(contents.values())).hexdigest()[:7]
    digests = {name: base64.b64encode(hashlib.sha256(x).digest()).decode() for name, x in contents.items()}
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{code}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--repo_id", default=f"OWNER/{NAME}", help="the Hub repository that the card names")
    args = parser.parse_args()
    print(f"wrote {export(args.output, args.repo_id)}")


if __name__ == "__main__":
    main()
