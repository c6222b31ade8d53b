"""Brings the code files of an older repository up to date: what `convert.py --update_code` does."""

import ast
import json
import re
import shutil
import tempfile
from pathlib import Path

from videonsa import config_class

from .card import install_line
from .conversion import OURS, code_files, read_config

# The line of a card that asks for versions.
INSTALL = re.compile(r'^pip install .*"transformers[^\n]*$', re.MULTILINE)


def update_code(folder: str | Path) -> tuple[list[str], list[str]]:
    """Write the code files of this project over those of a repository, in place; returns (written, removed) names.

    Files that the old code imported and that are gone are removed. Weights, configuration and all other files stay, but
    for classes named in `auto_map` of config.json, and for the versions that the card asks to install. All is
    written aside first, then moved into place, and moved back if that fails.

    Raises:
        ValueError: the folder is no VideoNSA repository, or its configuration is not one of this version.
    """
    folder = Path(folder)
    check_repository_folder(folder)
    # Raises for fields that there are no longer.
    config_class(read_config(folder)["model_type"]).from_pretrained(folder)
    wanted = {path.name: path.read_bytes() for path in code_files()}
    old = imported_files(folder)
    wanted |= {name: text.encode() for name, text in updated_texts(folder).items()}
    changed = sorted(
        name for name, data in wanted.items() if not (folder / name).is_file() or (folder / name).read_bytes() != data
    )
    removed = sorted(old - wanted.keys())
    replace_files(folder, {name: wanted[name] for name in changed}, removed)
    return changed, removed


def check_repository_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"--update_code must be a folder, got {folder}; download a Hub repository first (hf download)")
    config = read_config(folder)
    if not isinstance(config, dict) or config.get("model_type") not in OURS or "auto_map" not in config:
        raise ValueError(f"--update_code {folder} is no VideoNSA repository: its config.json does not say so")


def imported_files(folder: Path) -> set[str]:
    """Names of the Python files that load a repository: those that config.json names, the processor's, and what these
    import."""
    auto_map = read_config(folder)["auto_map"]
    seen, left = set(), {"processing_videonsa", *map(module_of, auto_map.values())}
    while left:
        path = folder / f"{left.pop()}.py"
        if path.is_file() and path.name not in seen:
            seen.add(path.name)
            left |= {node.module for node in ast.walk(ast.parse(path.read_text())) if is_relative(node)}
    return seen


def module_of(reference: str) -> str:
    """Of "module.Class". A reference to another repository, "owner/name--module.Class", names no file here."""
    return reference.partition(".")[0]


def is_relative(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.level == 1 and bool(node.module)


def updated_texts(folder: Path) -> dict[str, str]:
    """New texts of config.json and of the card. Only what depends on the code changes."""
    config = read_config(folder)
    code = {path.stem for path in code_files()}
    kept = {name: x for name, x in config["auto_map"].items() if "--" in x or module_of(x) in code}
    auto_map = {**kept, **config_class(config["model_type"])().auto_map}
    texts = {}
    if config["auto_map"] != auto_map:
        texts["config.json"] = json.dumps({**config, "auto_map": auto_map}, indent=2) + "\n"
    if (card := folder / "README.md").is_file():
        texts["README.md"] = INSTALL.sub(lambda _: install_line(), card.read_text(), count=1)
    return texts


def replace_files(folder: Path, files: dict[str, bytes], removed: list[str]) -> None:
    """Write files to a folder and remove others, all or none."""
    with tempfile.TemporaryDirectory(prefix=".update-", dir=folder) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        new.mkdir()
        old.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        for name in (*files, *removed):
            if (folder / name).exists():
                shutil.copy2(folder / name, old / name)
        try:
            for name in files:
                (new / name).replace(folder / name)
            for name in removed:
                (folder / name).unlink()
        except BaseException:
            for name in files:
                if not (old / name).exists():
                    (folder / name).unlink(missing_ok=True)
            for path in old.iterdir():
                path.replace(folder / path.name)
            raise
