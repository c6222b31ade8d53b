"""adapters/lmms_eval.py: what it asks the model, in which order and with which settings; compare_dense.py, which runs a
whole task of lmms-eval twice."""

import configparser
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import compare_dense
from lib.loading import assemble_tiny_model, read
from lib.needles import Settings, make_dataset
from lib.tiny import make_stock_checkpoint
from videonsa.adapters.lmms_eval import CALL_SETTINGS, VIDEO_SETTINGS, VideoNSA
from videonsa.configuration_videonsa import NSA_FIELDS, VideoNSATextConfig

ROOT = Path(__file__).resolve().parents[1]
TASK = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
task: needles
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
process_results: !function utils.process_results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
def doc_to_visual(doc):
    return [doc["video"]]


def process_results(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder of the tiny model and of four clips, and their questions as documents of a task."""
    folder = tmp_path_factory.mktemp("lmms")
    settings = Settings(seconds=(2.0, 4.0), questions=("colour", "where", "when"))
    data = make_dataset(folder / "clips", {"test": 4}, settings, seed=5, workers=1)
    documents = []
    for line in (data / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        turns = [message["content"] for message in record["messages"]]
        parts = [part for turn in turns if isinstance(turn, list) for part in turn]
        video = next(part["video"] for part in parts if part["type"] == "video")
        texts = [t if isinstance(t, str) else next(p["text"] for p in t if p["type"] == "text") for t in turns]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            documents.append({"video": str(data / video), "question": question.strip(), "answer": answer})
    (folder / "documents.json").write_text(json.dumps(documents))
    return SimpleNamespace(model=str(assemble_tiny_model(folder / "tiny")), documents=documents, folder=folder)


def requests_for(model, documents, options):
    """As lmms-eval makes them for a chat model."""

    def doc_to_messages(doc):
        times = {"start_time": doc.get("start"), "end_time": None}
        content = [{"type": "video", "url": doc["video"], **times}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    model.task_dict = {"needles": {"test": documents}}
    arguments = [(doc["question"], doc_to_messages, options, i, "needles", "test") for i, doc in enumerate(documents)]
    return [SimpleNamespace(args=args) for args in arguments]


def test_answers_are_those_of_the_demo_in_the_order_asked_for(clips):
    model = VideoNSA(clips.model, batch_size=3, fps=2, nsa_variant="paper", block_count=8, device="cpu")
    assert (model.model.config.block_count, model.batch_size) == (8, 3)
    documents = [clips.documents[0], {**clips.documents[1], "start": 0.5}, *clips.documents[2:5]]
    answers = model.generate_until(requests_for(model, documents, {"max_new_tokens": 6, "until": ["\n\n", "zz"]}))
    for document, answer in zip(documents, answers, strict=True):
        settings = {"fps": 2, **({"start": document["start"]} if "start" in document else {})}
        inputs, metadata = read(model.processor, document["video"], document["question"], **settings)
        assert metadata.plan.fps == pytest.approx(2, rel=0.4)
        output = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert model.processor.tokenizer.decode(output[0, length:], skip_special_tokens=True).strip() == answer
    assert len(set(answers)) > 1


def test_answers_end_before_a_stop_string(clips):
    model = VideoNSA(clips.model, device="cpu")
    whole, cut = (
        model.generate_until(requests_for(model, clips.documents[:1], {"max_new_tokens": 6, "until": until}))[0]
        for until in (None, clips.documents[0]["answer"][1:])
    )
    assert whole == clips.documents[0]["answer"] and cut == whole[0]


def test_a_system_prompt_goes_first_and_images_are_passed_on(clips):
    model = VideoNSA(clips.model, system_prompt="Be brief.", frame_tokens=4, fill_blocks=4, device="cpu")
    image = object()
    turn = {"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "?"}]}
    model.task_dict = {"t": {"s": [None]}}
    (system, user) = model.conversation(SimpleNamespace(args=("?", lambda doc: [turn], {}, 0, "t", "s")))
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert user["content"][0] == {"type": "image", "image": image}
    video = model.part({"type": "video", "url": "a.mp4", "start_time": None, "end_time": 3.0})
    assert video == {"type": "video", "video": "a.mp4", "frame_tokens": 4, "block_size": 4, "end": 3.0}
    with pytest.raises(ValueError, match="not audio"):
        model.part({"type": "audio", "url": "a.wav"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder, nor a Hub id, which is OWNER/NAME"),
        (lambda folder: folder.mkdir(), "cannot be read: .*config.json"),
        (
            lambda folder: make_stock_checkpoint(folder, num_hidden_layers=1),
            "is a qwen2_5_vl checkpoint, not a VideoNSA",
        ),
    ],
    ids=["nothing", "empty", "stock"],
)
def test_what_is_no_repository_is_said_in_one_line(make, message, tmp_path):
    make(tmp_path / "given")
    with pytest.raises(ValueError, match=f"--model_args pretrained={tmp_path / 'given'} {message}") as raised:
        VideoNSA(str(tmp_path / "given"), device="cpu")
    assert "\n" not in str(raised.value)


def test_every_documented_setting_is_taken(clips):
    changes = {"block_spread": False, "block_per_head": True, "block_remainder": True, "block_causal": True}
    changes |= {"truncate_seconds": True, "nsa_variant": "merged", "nsa_backend": "torch", "gate_temperature": 0.3}
    fields = {name: changes.get(name, getattr(VideoNSATextConfig(), name)) for name in NSA_FIELDS}
    settings, call = {"max_frames": 8, "prefer": "frames", "on_error": "keep"}, {"timeout": 3, "max_duration": 60}
    model = VideoNSA(clips.model, device="cpu", attn_implementation="eager", **settings, **call, **fields)
    assert {name: getattr(model.model.config, name) for name in NSA_FIELDS} == fields
    assert model.model.config.text_config._attn_implementation == "eager"
    assert (model.video_settings, model.call_settings) == (settings, call)
    assert model.generate_until(requests_for(model, clips.documents[:1], {"max_new_tokens": 1}))
    section = (ROOT / "docs/videos.md").read_text().split("\n## Settings\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"start", "end"}
    assert "max_source_pixels" in documented and documented <= {*VIDEO_SETTINGS, *CALL_SETTINGS}
    with pytest.raises(ValueError, match="it may have .*block_count.*frame_tokens.*max_source_pixels"):
        VideoNSA("gone", frames=8)


def test_the_entry_point_names_the_manifest():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["lmms_eval.models"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "videonsa" and callable(getattr(importlib.import_module(module), function))
    assert module.rpartition(".")[0] in setup["options"]["packages"].split()


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (True, 1.0),  # LVBench
        ({"score": 0.0, "reason_type": "count"}, 0.0),  # Tomato, Video-MME
        ({"question_type": "object_counting", "MRA:.5:.95:.05": 0.3}, 0.3),  # VSI-Bench
        ({"pred_answer": "b", "answer": "B"}, 1.0),  # MLVU, TimeScope, LongTimeScope
        ({"parsed_pred": "A", "answer": "B"}, 0.0),  # LongVideoBench
    ],
)
def test_scores_of_questions_are_found_where_the_tasks_keep_them(kept, expected):
    assert compare_dense.score(kept, "task", "metric") == expected


def test_a_task_that_keeps_no_scores_is_named():
    with pytest.raises(ValueError, match='task captions keeps no score of each question for bleu, but {"text": "a"}'):
        compare_dense.score({"text": "a"}, "captions", "bleu")


@pytest.mark.needs("lmms_eval")
def test_lmms_eval_compares_sparse_with_dense_on_a_local_task(clips, tmp_path, monkeypatch, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/needles.yaml").write_text(TASK.format(data=clips.folder / "documents.json"))
    (tmp_path / "tasks/utils.py").write_text(UTILS)
    options = ["--batch_size", "4", "--model_args", "fps=4,max_frames=8", "--include_path", str(tmp_path / "tasks")]
    output = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["compare_dense.py", clips.model, "needles", str(output), *options])
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    compare_dense.main()
    result = json.loads((output / "comparison.json").read_text())
    row, questions = result["tasks"]["needles"], len(clips.documents)
    assert result["variants"] == {"dense": "dense", "sparse": "paper"} and row["questions"] == questions
    for run in ("dense", "sparse"):
        assert row[run]["score"] == pytest.approx(row[run]["results"]["right,none"])
        throughput = row[run]["throughput"]
        assert throughput["total_gen_tokens"] >= questions
        assert throughput["avg_latency"] == pytest.approx(throughput["total_elapsed_time"] / questions)
    difference = row["difference"]
    assert difference["mean_diff"] == pytest.approx(row["sparse"]["score"] - row["dense"]["score"])
    assert difference["n"] == questions and difference["ci_lower"] <= difference["mean_diff"] <= difference["ci_upper"]
    assert row["sparse"]["score"] >= 0.75 and 0 < row["agreement"] <= 1
    printed = capsys.readouterr().out
    assert "nsa_variant=dense --tasks needles" in printed and f"needles, right, {questions} questions" in printed
