"""evaluate.py: what counts as right, one decoding per clip, resuming, and the table."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from transformers import AutoProcessor

import evaluate
from evaluate import format_table
from lib import answering
from lib.answering import Prompts, accuracy, is_correct, list_questions
from lib.data import load_samples

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tiny_repository, needles, tmp_path):
    """Runs evaluate() on the test split and returns the content of its output."""

    def run(output="out.json", **changes):
        args = {"model": str(tiny_repository), "data": str(needles / "test.jsonl"), "output": str(tmp_path / output)}
        args |= {
            "media_root": None,
            "nsa_variant": None,
            "fps": None,
            "max_frames": None,
            "batch_size": 3,
            "limit": None,
        }
        args |= {"max_new_tokens": 3, "workers": 0, "device": "cpu", **changes}
        result = evaluate.evaluate(SimpleNamespace(**args))
        assert json.loads((tmp_path / output).read_text()) == result
        assert not (tmp_path / f"{output}.partial").exists()
        return result

    return run


@pytest.mark.parametrize(
    ("answered", "expected", "right"),
    [
        ("red", "red", True),
        (" Red. ", "red", True),
        ("red  star", "Red star", True),
        ("the red star", "red star", False),
        ("reddish", "red", False),
        ("B", "B", True),
        ("b.", "B", True),
        ("(B) a boat", "B", True),
        ("Answer: (B)", "(B) a boat", True),
        ("B. a boat", "Answer: (B) Collision", True),
        ("A", "B", False),
        ("Boat", "B", False),
        ("", "B", False),
        ("A boat", "A boat", True),
        ("a", "A boat", False),
    ],
)
def test_answers_are_compared_by_letter_or_by_words(answered, expected, right):
    assert is_correct(answered, expected) is right


@pytest.mark.parametrize("repository", ["tiny_repository", "qwen3_repository"])
def test_every_question_is_asked_by_itself_with_the_media_so_far(request, repository, needles, tmp_path):
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(repository), trust_remote_code=True)
    image = next((needles / "train").glob("*.png"))
    clip = next((needles / "train").glob("*.mp4"))
    turns = [("<video>\nOne?", "1"), ("Two?", "2"), ("<image>Three?", "3")]
    conversation = [{"from": "system", "value": "Be brief."}]
    for question, answer in turns:
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"video": str(clip), "image": str(image), "types": ["a", "b"], "conversations": conversation}
    untyped = {**record, "types": None, "type": None}
    (tmp_path / "data.json").write_text(json.dumps([record, untyped]))
    (sample, other), _ = load_samples([str(tmp_path / "data.json")], processor)
    assert [q.type for q in list_questions(other)] == ["all"] * 3
    questions = list_questions(sample)
    assert [(q.type, q.expected) for q in questions] == [("a", "1"), ("b", "2"), ("all", "3")]
    for question, (_, prompt) in zip(questions, Prompts([questions], processor)[0], strict=True):
        whole = processor.apply_chat_template(
            question.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert prompt["input_ids"].tolist() == whole["input_ids"][0].tolist()
        for name in set(prompt) - {"input_ids"}:
            torch.testing.assert_close(prompt[name], torch.as_tensor(whole[name]))
        kinds = [part["type"] for part in question.messages[1]["content"]]
        assert kinds == ["video", *["image"] * ("Three" in str(question)), "text"]


def test_a_batch_answers_like_single_prompts_and_types_and_lengths_are_counted(run, needles):
    one, three = run("one.json", batch_size=1), run("three.json")
    assert one["answers"] == three["answers"]
    types = [kind for line in (needles / "test.jsonl").read_text().splitlines() for kind in json.loads(line)["types"]]
    counts = {kind: row["all"]["questions"] for kind, row in one["accuracy"].items()}
    assert counts == {"all": len(types), **{kind: types.count(kind) for kind in types}}
    for entry in one["answers"]:
        assert entry["correct"] == is_correct(entry["answered"], entry["expected"]) and entry["tokens"] > 60
    assert one["nsa"]["nsa_variant"] == "paper" and one["device"] == "cpu"


def test_a_limit_takes_samples_spread_over_the_lengths(run, tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "a " * i + "?"}, {"role": "assistant", "content": "b"}]}
        for i in range(10)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    result = run(data=str(tmp_path / "data.json"), nsa_variant="dense", limit=6)
    assert result["nsa"]["nsa_variant"] == "dense"
    assert [entry["id"] for entry in result["answers"]] == [f"data.json[{i}] 0" for i in (0, 1, 3, 5, 6, 8)]


def test_an_interrupted_run_goes_on_where_it_was(run, tiny_repository, tmp_path, monkeypatch):
    whole = run("whole.json")
    real, calls = answering.answer, []

    def stop_at_the_second(*args):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(answering, "answer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run()
    partial = tmp_path / "out.json.partial"
    partial.write_text(partial.read_text() + '{"id": "cut')
    with pytest.raises(ValueError, match="partial is of a run with another nsa_variant"):
        run(nsa_variant="dense")
    weights = next(tiny_repository.glob("*.safetensors"))
    before = weights.stat()
    os.utime(weights)  # another training may have written it
    with pytest.raises(ValueError, match="partial is of a run with another checkpoint"):
        run()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run()["answers"] == whole["answers"]
    assert sum(calls) == len(whole["answers"]) + 3  # the batch of the interruption twice
    with pytest.raises(ValueError, match="out.json exists already"):
        run()


def test_right_answers_score_one_and_broken_media_are_dropped(run, needles, tmp_path, monkeypatch):
    lines = (needles / "test.jsonl").read_text().splitlines()
    gone = {
        "messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}],
        "video": "gone.mp4",
    }
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([*lines, json.dumps(gone)]))
    first = next(path for path in sorted((needles / "test").iterdir()) if path.suffix == ".mp4")
    whole = first.read_bytes()
    start, moov = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    damaged = whole[:start] + bytes(moov - start) + whole[moov:]
    (tmp_path / "test").mkdir()
    for path in (needles / "test").iterdir():
        (tmp_path / "test" / path.name).write_bytes(damaged if path == first else path.read_bytes())
    expected = iter(())

    def know(model, processor, batch, max_new_tokens):
        return [next(expected) for _ in batch]

    monkeypatch.setattr(answering, "answer", know)
    original = answering.Prompts.__getitem__

    def remember(self, index):
        nonlocal expected
        prompts = original(self, index)
        if isinstance(prompts, list):
            expected = iter([*expected, *(question.expected.upper() for question, _ in prompts)])
        return prompts

    monkeypatch.setattr(answering.Prompts, "__getitem__", remember)
    result = run(data=str(data), batch_size=1000)
    assert result["accuracy"]["all"]["all"]["accuracy"] == 1.0
    reasons = [drop["reason"] for drop in result["dropped"]]
    assert len(reasons) == 2 and "missing file: gone.mp4" in reasons[0] and first.name in reasons[1]


def test_the_table_has_types_as_rows_and_lengths_as_columns():
    answers = [
        {"type": kind, "tokens": tokens, "correct": right}
        for kind, tokens, right in (
            ("when", 100, True),
            ("when", 3000, False),
            ("colour", 128, True),
            ("colour", 129, True),
        )
    ]
    table = accuracy(answers)
    assert table["when"] == {
        "all": {"accuracy": 0.5, "questions": 2},
        "128": {"accuracy": 1.0, "questions": 1},
        "4096": {"accuracy": 0.0, "questions": 1},
    }
    lines = format_table(table).splitlines()
    assert lines[0].split("  ")[-1].strip() == "≤ 4,096"
    assert [line.split()[0] for line in lines] == ["type", "all", "colour", "when"]
    assert "75.0 (4)" in lines[1] and len(set(map(len, lines))) == 1


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["all", "all"], {"all": 2}),
        (["when", "when"], {"all": 2, "when": 2}),
        (["when", "all", "all"], {"all": 3, "when": 1}),
    ],
    ids=["untyped", "typed", "mixed"],
)
def test_a_question_without_a_type_counts_once(types, expected):
    table = accuracy([{"type": kind, "tokens": 100, "correct": True} for kind in types])
    for length in ("all", "128"):
        assert {kind: row[length]["questions"] for kind, row in table.items()} == expected


def test_data_without_a_question_is_refused_with_the_reasons(run, tmp_path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns, "video": f"{i}.mp4"} for i in range(2)]))
    reason = (
        "2 samples were dropped: 2 × the text has 0 <video> tags, the record 1 video .such as data.json.0.: the text"
    )
    with pytest.raises(ValueError, match=f"no question that can be asked; {reason}"):
        run(data=str(tmp_path / "data.json"))


def test_a_training_that_was_stopped_is_no_model(run, tmp_path):
    for step in (4, 12):
        (tmp_path / f"tuned/checkpoint-{step}").mkdir(parents=True)
    said = "model .*tuned holds no finished model: resume the training, or name .*tuned/checkpoint-12$"
    with pytest.raises(FileNotFoundError, match=said):
        run(model=str(tmp_path / "tuned"))


def test_the_script_prints_the_table_and_says_what_is_wrong(tiny_repository, needles, tmp_path, monkeypatch):
    command = [ROOT / "examples/evaluate.py", tiny_repository, needles / "test.json", tmp_path / "out.json"]
    done = forks.run(*command, "--limit", 1, "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["type", "all"] and "wrote" in done.stdout
    with pytest.raises(SystemExit, match="evaluate.py: data file .*gone.json does not exist"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tiny_repository), str(tmp_path / "gone.json"), "b.json"])
        evaluate.main()
