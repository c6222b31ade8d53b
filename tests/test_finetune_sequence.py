"""finetune.py --sequence_parallel: processes that share the tokens of a batch train as one process does."""

import json

import pytest
import torch
from processes import run
from trainings import losses, weights

import finetune
from accelerate import ParallelismConfig
from lib.training import check_parallelism

STEPS = 10
OPTIONS = ["--gradient_checkpointing", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
OPTIONS += ["--logging_steps", "1", "--report_to", "none", "--dataloader_num_workers", "0"]
OPTIONS += ["--max_steps", str(STEPS), "--save_steps", str(STEPS // 2)]


def train_together(model: str, data: str, output: str, *options: str) -> None:
    given = ["--model", model, "--train_data", data, "--output_dir", output, *OPTIONS, *options]
    finetune.finetune(*finetune.parse_arguments(given))


def test_ranks_train_as_one_process_does_which_resumes_them(train, tiny_repository, needles, tmp_path):
    batch = ("--per_device_train_batch_size", "2")
    alone, folder, _ = train(*OPTIONS, *batch)
    expected = losses(alone)
    assert len(expected) == STEPS

    # Two at a time, each by two ranks that share its tokens.
    together = tmp_path / "together"
    run(train_together, 4, tiny_repository, needles / "train.json", together, "--sequence_parallel", "2")
    history = json.loads((together / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
    logs = [log for log in history if "loss" in log]
    assert [log["loss"] for log in logs] == pytest.approx(expected, rel=1e-3)
    gates = [log for log in alone.state.log_history if "loss" in log][0]
    assert logs[0]["gate_window"] == pytest.approx(gates["gate_window"], abs=0.01)
    trained, by_ranks = weights(folder), weights(together)
    assert trained.keys() == by_ranks.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(by_ranks[name], weight, rtol=0, atol=2e-3, msg=name)

    # One process goes on where they were after half of the steps.
    middle = together / f"checkpoint-{STEPS // 2}"
    resumed, _, _ = train(*OPTIONS, *batch, "--resume_from_checkpoint", middle, output="together")
    assert losses(resumed)[STEPS // 2 :] == pytest.approx(expected[STEPS // 2 :], rel=1e-3)


@pytest.mark.parametrize("size", ["0", "2"])
def test_ranks_that_do_not_divide_the_processes_are_an_error(size, train):
    with pytest.raises(ValueError, match=f"--sequence_parallel must divide the number of processes, 1, got {size}"):
        train(*OPTIONS, "--sequence_parallel", size)


def test_splitting_of_tokens_by_accelerate_is_an_error():
    check_parallelism(ParallelismConfig())
    with pytest.raises(ValueError, match="cp_size of accelerate must be 1, got 2.* --sequence_parallel 2"):
        check_parallelism(ParallelismConfig(cp_size=2))
