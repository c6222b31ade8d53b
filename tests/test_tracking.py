"""What TensorBoard and Weights & Biases get of a training, and that a resumed one goes on in the same run."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
from lib import tracking
from lib.observe import BRANCHES
from lib.tracking import check_trackers

OPTIONS = ["--logging_steps", 1, "--dataloader_num_workers", 0, "--save_steps", 2, "--learning_rate", 1e-3]


def read(folder) -> EventAccumulator:
    """The events of the only run of an output folder."""
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def text(events, name) -> list[tuple[int, str]]:
    """The texts of a name, by step."""
    found = events.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def test_tensorboard_gets_rates_gates_memory_arguments_and_answers_also_of_a_resumed_run(train, needles):
    options = [*OPTIONS, "--method", "lora", "--gate_learning_rate", 1e-2, "--lr_scheduler_type", "constant"]
    options += ["--eval_data", needles / "validation.json", "--eval_strategy", "steps", "--eval_steps", 2]
    options += ["--eval_answers", 3]
    _, folder, _ = train("--max_steps", 3, *options)
    # What was logged of step 3 is replaced.
    trainer, folder, _ = train("--max_steps", 4, "--resume_from_checkpoint", folder / "checkpoint-2", *options)
    events = read(folder)
    for name in ("loss", "tokens_per_second", "memory_gib", "gate_window/layer_00", "learning_rate/gates"):
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4], name
    last = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert last["train/learning_rate/gates"] == pytest.approx(1e-2)
    assert last["train/learning_rate/lora_language"] == last["train/learning_rate/merger"] == pytest.approx(1e-3)
    assert {f"train/gate_{branch}" for branch in BRANCHES} <= last.keys()
    assert 0.1 < last["train/memory_gib"] < 30 and last["eval/exact_match"] == 0

    # The reader of TensorBoard keeps texts of replaced steps.
    (step, answers), *_, (last_step, _) = text(events, "eval/answers")
    assert (step, last_step) == (2, 4)
    head, _, *rows = answers.splitlines()
    assert head == "| question | expected | answered | correct |" and len(rows) == 3
    assert [row.split(" | ")[1] for row in rows] == [question.expected for question in trainer.questions]
    _, arguments = text(events, "data")[0]
    assert '"max_dropped": 0.1' in arguments and str(needles / "train.json") in arguments
    assert '"lora_rank": 16' in text(events, "model")[0][1] and "gate_learning_rate" in text(events, "args")[0][1]


def test_exact_match_is_the_share_of_right_answers(train, needles, monkeypatch):
    monkeypatch.setattr(finetune, "train_to_the_end", lambda trainer, resume: trainer.state)
    options = [*OPTIONS, "--report_to", "none", "--eval_data", needles / "validation.json"]
    trainer, _, _ = train(*options, "--eval_answers", 4)
    expected = iter([trainer.questions[0].expected.upper(), "no", trainer.questions[2].expected, "no"])
    monkeypatch.setattr("lib.training.answer", lambda *_: [next(expected)])
    assert trainer.evaluate()["eval_exact_match"] == 0.5
    trainer.questions = []
    assert "eval_exact_match" not in trainer.evaluate()


def test_trackers_that_are_unknown_or_missing_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--report_to must be none, all, or some of .*wandb; got tensorbord"):
        check_trackers(["tensorboard", "tensorbord"])
    monkeypatch.setattr(tracking, "get_available_reporting_integrations", lambda: ["tensorboard"])
    required = ["--model", "m", "--train_data", "d", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--report_to wandb needs a package .*: pip install wandb$"):
        finetune.parse_arguments([*required, "--report_to", "tensorboard", "wandb"])
    with pytest.raises(ValueError, match="--report_to comet_ml needs a package .*: pip install comet-ml$"):
        finetune.parse_arguments([*required, "--report_to", "comet_ml"])
    _, _, args = finetune.parse_arguments([*required, "--report_to", "none"])
    assert args.report_to == []


@pytest.mark.needs("wandb")
def test_wandb_and_tensorboard_follow_a_run_and_its_resumption(train, needles, tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    options = [*OPTIONS, "--report_to", "wandb", "tensorboard", "--eval_answers", 2]
    options += ["--eval_data", needles / "validation.json", "--eval_strategy", "steps", "--eval_steps", 2]
    train("--max_steps", 2, *options)
    _, folder, _ = train("--max_steps", 4, "--resume_from_checkpoint", "last", *options)
    kept = [json.loads((folder / f"checkpoint-{step}/trackers.json").read_text()) for step in (2, 4)]
    assert kept[0] == kept[1] and (folder / kept[0]["tensorboard"]).is_dir()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(kept[0]["wandb"]) for run in runs)
    assert list(runs[0].rglob("*answers*.table.json"))
    for run in runs:
        content = next(run.glob("*.wandb")).read_bytes()
        for name in (b"max_dropped", b"lora_rank", b"train/learning_rate/gates", b"eval/exact_match"):
            assert name in content
    assert len(read(folder).Scalars("train/loss")) == 4
