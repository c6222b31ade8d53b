"""demo.py as a user runs it: what is on the screen, which answers are right, and how it ends."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import pytest

import demo
from lib import tiny

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("model", "limit", "video", "plan", "tokens", "attention", "question", "answer", "time", "looked")


@pytest.fixture
def run_demo(monkeypatch, capsys):
    """Runs the demo with options; returns its lines, of each label those that begin with it."""

    def run(*options) -> dict[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, options)])
        demo.main()
        return by_label(capsys.readouterr().out)

    return run


def by_label(text: str) -> dict[str, list[str]]:
    lines = defaultdict(list)
    for line in text.splitlines():
        if line:
            label, rest = line.split(maxsplit=1)
            lines[label].append(rest)
    return lines


@pytest.fixture
def mistaken(monkeypatch):
    """Makes one thing that is said of clips untrue."""
    make_sample = demo.make_sample

    def make_mistaken(*args):
        sample = make_sample(*args)
        sample["questions"][1]["answer"] = "nowhere"
        return sample

    monkeypatch.setattr(demo, "make_sample", make_mistaken)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=3, fps=6, width=160, height=96)


def test_nothing_but_its_own_lines_is_on_the_screen_and_all_answers_are_right():
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # No bar and no progress, either: it is no terminal.
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = [line for line in done.stdout.splitlines() if line]
    assert [line for line in lines if not line.startswith(LABELS)] == []
    found = by_label("\n".join(lines))
    assert "trained" in found["model"][0] and "block_count=4" in found["model"][0]
    assert found["video"] == ["made on the spot, seed 1: 8.0 s of 112 × 112"]
    assert "32 frames of 112 × 112, 4 per second from 0.0 to 8.0 s" in found["plan"][0]
    assert found["limit"] == ["8,192 tokens on a cpu, 1,024 of them for text; --max_tokens changes it"]
    assert "256 vision" in found["tokens"][0]
    pairs = 256 * 257 / 2
    selected, window = (n * (n + 1) / 2 + (256 - n) * n for n in (4 * 16, 32))
    assert f"{(selected + window) / pairs:.1%} of the query" in found["attention"][0]
    assert len(found["question"]) == len(found["answer"]) == len(found["time"]) == 4
    for line in found["answer"]:
        answer, label, truth, mark = line.split()
        assert (answer, label, mark) == (truth, "truth", "✓")
    # The needle is on screen from 0.25 to 1.0 s.
    assert len(found["looked"]) == 4
    for line in found["looked"]:
        (first, *_) = re.findall(r"(\d:\d\d(?:\.\d)?) \(\d+ %\)", line)
        assert line.startswith("at") and first in ("0:00", "0:00.5")
    assert last.startswith("4 of 4 right. Next: ")
    interpreter, script, *options = shlex.split(last.split("`")[1])
    assert (ROOT / script).is_file() and options == ["--seed", "2"]
    assert "“Use a checkpoint”" in last and "\n## Use a checkpoint\n" in (ROOT / "README.md").read_text()


def test_a_wrong_answer_about_the_fixed_clip_is_marked_and_ends_with_an_error(mistaken, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit, match="3 of 4 right, where this model answers all of them"):
        demo.main()
    answers = by_label(capsys.readouterr().out)["answer"]
    assert [line[-1] for line in answers] == ["✓", "✗", "✓", "✓"]
    assert answers[1].split()[1:] == ["truth", "nowhere", "✗"]


@pytest.mark.parametrize("options", [("--seed", 1), ("--fps", 4), ("--nsa_variant", "paper")])
def test_a_wrong_answer_to_anything_else_is_no_error(mistaken, run_demo, options):
    lines = run_demo(*options)
    assert lines["answer"][1].endswith("✗")
    assert " ".join(lines["3"]).startswith("of 4 right. Next: another clip")


def test_an_answer_that_is_cut_says_so_and_is_not_right(run_demo, monkeypatch):
    assert run_demo("--seed", 1, "--max_new_tokens", 1)["answer"][0].split() == [
        "start", "…", "(cut:", "--max_new_tokens)", "truth", "start", "✗",
    ]  # fmt: skip
    lines = run_demo("--seed", 1, "--question", "What colour was the star?")
    assert lines["answer"] == ["yellow"]
    assert not any("truth" in line or "right" in line for lines in lines.values() for line in lines)


def test_an_empty_answer_says_so_and_what_the_tiny_model_knows(run_demo, monkeypatch):
    load = demo.load

    def load_mute(*args):
        model, processor = load(*args)
        words = set(range(model.config.text_config.vocab_size)) - {model.generation_config.eos_token_id}
        model.generation_config.suppress_tokens = sorted(words)
        return model, processor

    monkeypatch.setattr(demo, "load", load_mute)
    (answer,) = run_demo("--seed", 1, "--question", "Who speaks?")["answer"]
    said = "empty: the model ended its answer at once; this tiny model knows nothing but coloured shapes"
    assert answer == f"({said})"


def test_deprecations_are_not_printed_into_an_answer(run_demo, monkeypatch, recwarn):
    read = demo.read

    def read_and_warn(*args, **settings):
        warnings.warn("old", FutureWarning, stacklevel=1)
        return read(*args, **settings)

    monkeypatch.setattr(demo, "read", read_and_warn)
    assert run_demo("--question", "What colour was the star?")["answer"] == ["yellow"]
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize(
    ("repository", "variants", "size", "tokens"),
    [
        # 96 rounds to 3 * 28 = 84 and 160 to 6 * 28, or to 3 * 32 and 5 * 32.
        ("tiny_repository", ("paper", "dense"), "168 × 84", 3 * 6),
        ("qwen3_repository", ("paper",), "160 × 96", 3 * 5),
    ],
)
def test_a_repository_is_asked_about_a_given_video(request, clip, run_demo, repository, variants, size, tokens):
    folder = request.getfixturevalue(repository)
    asked = ("--model", folder, "--video", clip, "--question", "Where is it?", "--max_new_tokens", 3)
    for variant in variants:
        lines = run_demo(*asked, "--nsa_variant", variant, "--device", "cpu")
        assert f"nsa_variant={variant}" in lines["model"][0]
        assert lines["video"][0].startswith(f"{clip}: ")
        assert f"12 frames of {size}, 4 per second" in lines["plan"][0]
        assert f"{6 * tokens:,} vision" in lines["tokens"][0]
        assert lines["question"] == ["Where is it?"] and set(lines) == set(LABELS)
    assert ("100.0% of the query" in lines["attention"][0]) == (variant == "dense")


def test_a_video_is_read_within_a_budget(tiny_repository, run_demo):
    options = ("--max_tokens", 1100, "--prefer", "frames", "--fps", 2, "--max_new_tokens", 1)
    (plan,) = run_demo("--model", tiny_repository, *options)["plan"]
    assert "16 frames of 84 × 84, 2 per second" in plan and "72 of 76 in all" in plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "no-such-file.mp4"], "no-such-file.mp4"),
        (["--nsa_variant", "sparse"], "nsa_variant must be one of"),
        (["--model", "{stock}"], "make one with: python examples/convert.py"),
    ],
)
def test_what_is_wrong_is_explained(stock_checkpoint, run_demo, options, message):
    with pytest.raises(SystemExit, match=rf"(?s)^demo.py: .*{message}"):
        run_demo(*(option.format(stock=stock_checkpoint) for option in options))


def test_a_missing_video_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "nowhere/nothing", "--video", "nothing.mp4"])
    with pytest.raises(SystemExit, match="demo.py: --video nothing.mp4: there is no such file"):
        demo.main()
