"""The options of the scripts: one spelling, older ones understood, fields as the configuration has them."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest

import analyze
import finetune
from lib.fields import MEANINGS, SIZES, add_fields, given_fields
from lib.options import OptionParser
from videonsa.configuration_videonsa import NSA_FIELDS, NSA_VARIANTS, VideoNSATextConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
REQUIRED = ("--model", "m", "--train_data", "d", "--output_dir", "o")


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What a script prints for --help, with further arguments before it."""

    def show(script: str, *before: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *before, "--help"])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    return show


def test_no_script_is_imported_by_another_file():
    for path in (ROOT / "examples").rglob("*.py"):
        assert not {*SCRIPTS} & {*re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE)}, path


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_options_with_underscores(help_of, script):
    commands = [(), *((name,) for name in analyze.FINDINGS)] if script == "analyze" else [()]
    for command in commands:
        text = help_of(script, *command)
        assert "--help" in text
        assert not re.findall(r"(?<!\w)--\w+-[\w-]+", text)


def test_hyphens_and_older_names_are_understood():
    parser = OptionParser()
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--video")
    add_fields(parser)
    one = parser.parse_args(["--max_tokens", "5", "--nsa_variant", "dense", "--video=a-b--c.mp4", "--block_size=16"])
    two = parser.parse_args(["--max-tokens", "5", "--variant", "dense", "--video=a-b--c.mp4", "--block-size=16"])
    assert one == two and one.video == "a-b--c.mp4"
    assert given_fields(one) == {"nsa_variant": "dense", "block_size": 16}


def test_commands_and_abbreviations_of_a_script_take_both_spellings():
    for option in ("--max-new-tokens", "--max_new_tokens", "--max-new"):
        assert analyze.make_parser().parse_args(["gates", option, "3"]).max_new_tokens == 3


def test_finetune_takes_both_spellings(tmp_path):
    (tmp_path / "options.yaml").write_text("max-length: 512\nblock_count: 5\n")
    given = ["--config", str(tmp_path / "options.yaml"), *REQUIRED]
    one = finetune.parse_arguments([*given, "--nsa_variant", "dense", "--learning_rate", "1", "--no_train_merger"])
    two = finetune.parse_arguments([*given, "--variant", "dense", "--learning-rate", "1", "--no-train-merger"])
    for model, data, args in (one, two):
        assert (model.nsa_variant, model.block_count, model.train_merger) == ("dense", 5, False)
        assert (data.max_length, args.learning_rate) == (512, 1)


def test_help_of_finetune_lists_our_options_first_by_topic(help_of):
    text = help_of("finetune")
    ours, trainers = text.split(f"\n{finetune.TRAINER_TOPIC}:\n")
    listed = re.findall(r"^  (?:-h, )?--(\w+)", ours, re.MULTILINE)
    assert [name for name in listed if not name.startswith("no_")] == [n for t in finetune.TOPICS.values() for n in t]

    own = {
        field.name for kind in (finetune.ModelArguments, finetune.DataArguments) for field in dataclasses.fields(kind)
    }
    own |= {*finetune.FinetuneArguments.__annotations__}
    assert own <= {*listed}
    assert "--adam_beta1" in trainers and ours.index("--model") < ours.index("--max_length") < ours.index(
        "--nsa_variant"
    )
    assert "the opposite of --train_language" in ours


def test_every_field_of_the_configuration_has_its_meaning_and_is_an_option():
    assert {*MEANINGS} == {*NSA_FIELDS}
    assert {*SIZES} <= {*NSA_FIELDS}
    assert all(variant in MEANINGS["nsa_variant"] for variant in NSA_VARIANTS)

    parser = OptionParser()
    add_fields(parser)
    config = VideoNSATextConfig()
    for name in MEANINGS:
        value = getattr(config, name)
        value = True if value is None else value
        assert given_fields(parser.parse_args([f"--{name}", str(value)])) == {name: value}
