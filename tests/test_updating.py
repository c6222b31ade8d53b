"""convert.py --update_code: the code of an older repository, in place."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import convert
from lib.conversion import code_files


@pytest.fixture
def older(tiny_repository, tmp_path):
    """A repository as an older version would have written it, with files of its owner."""
    folder = shutil.copytree(tiny_repository, tmp_path / "older")
    modeling = folder / "modeling_videonsa.py"
    modeling.write_text("from .nsa_old import x\n" + modeling.read_text())
    (folder / "nsa_old.py").write_text("from .nsa_older import x\n")
    (folder / "nsa_older.py").write_text("x = 1\n")
    (folder / "handler.py").write_text("from .modeling_videonsa import VideoNSAModel\n")
    (folder / "video_source.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForVision2Seq"] = "modeling_old.Model"
    config["note"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    card = folder / "README.md"
    text = card.read_text().replace("transformers>=5.17", "transformers>=5.1")
    card.write_text(text + "\nMy own words.\n")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, options)])
    convert.main()


def test_old_code_is_replaced_and_all_else_is_kept(older, tiny_repository, monkeypatch, capsys):
    before = contents(older)
    run(monkeypatch, "--update_code", older)
    after = contents(older)
    for path in code_files():
        assert after.pop(path.name) == path.read_bytes()
    assert {"nsa_old.py", "nsa_older.py"} == before.keys() - contents(older).keys()
    for name in after.keys() - {"config.json", "README.md"}:
        assert after[name] == before[name], name

    assert after["README.md"] == (tiny_repository / "README.md").read_bytes() + b"\nMy own words.\n"
    new, old = (json.loads(files["config.json"]) for files in (after, before))
    del old["auto_map"]["AutoModelForVision2Seq"]
    assert new == old and list(new) == list(old)
    printed = capsys.readouterr().out
    assert "removed nsa_old.py, nsa_older.py\n" in printed and "video_source.py" in printed

    stamps = {path: path.stat().st_mtime_ns for path in older.iterdir()}
    run(monkeypatch, "--update_code", older)
    assert capsys.readouterr().out == "wrote nothing\nremoved nothing\n"
    assert stamps == {path: path.stat().st_mtime_ns for path in older.iterdir()}


def test_nothing_is_changed_if_a_file_cannot_be_replaced(older, monkeypatch):
    before, replace = contents(older), Path.replace

    def fail(path, target):
        if Path(target).name == "video_source.py" and path.parent.name == "new":
            raise OSError("disk full")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SystemExit, match="convert.py: disk full"):
        run(monkeypatch, "--update_code", older)
    assert contents(older) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{folder}/gone"], "must be a folder, got .*gone"),
        (["{folder}"], "is no VideoNSA repository"),
        (["{stock}"], "is no VideoNSA repository"),
        (["{removed}"], "block_mass has been removed, set block_count instead; got 0.5"),
    ],
)
def test_other_folders_are_refused_and_left_alone(options, message, older, stock_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    path = older / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["block_mass"] = 0.5
    path.write_text(json.dumps(config))
    folders = {"folder": tmp_path / "empty", "stock": stock_checkpoint, "removed": older}
    before = {folder: contents(folder) for folder in folders.values()}
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--update_code", *(option.format(**folders) for option in options))
    assert before == {folder: contents(folder) for folder in folders.values()}


@pytest.mark.parametrize("options", [[], ["source"], ["source", "out", "--update_code", "folder"]])
def test_convert_wants_a_source_and_an_output_or_a_folder_to_update(options, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *options)
    assert "name SOURCE and OUTPUT, or --update_code FOLDER" in capsys.readouterr().err
