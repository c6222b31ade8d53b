"""The configurations of examples/accelerate train as one process does: two processes on the CPU, over gloo."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
from finetune import parse_arguments
from lib.training import part_of
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Runs finetune.py once per list of options. accelerate chooses FSDP on accelerators only: here, it gets it on a CPU.
PROGRAM = """
import json
import sys

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import finetune

initialize = AcceleratorState.__init__


def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        plugin.set_mixed_precision(self._mixed_precision)


AcceleratorState.__init__ = initialize_with_fsdp
torch.set_num_threads(1)
for options in json.loads(sys.argv[1]):
    trainer = finetune.finetune(*finetune.parse_arguments(options))
    if trainer.accelerator.is_main_process:
        print("trained by", type(trainer.model_wrapped).__name__, flush=True)
torch.distributed.destroy_process_group()
"""

METHODS = {"full": {"language", "merger", "gates"}, "lora": {"language", "merger", "gates"}, "gates": {"gates"}}
OPTIONS = ["--bf16", "--gradient_checkpointing", "--learning_rate", 1e-3, "--lr_scheduler_type", "constant"]
OPTIONS += ["--lora_dropout", 0, "--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0]


@pytest.fixture(scope="module")
def options(tiny_repository, needles):
    """The options of a run of a method."""

    def of(method, folder, *more):
        given = ["--model", tiny_repository, "--train_data", needles / "train.json", "--output_dir", folder]
        return [*map(str, [*given, "--method", method, *OPTIONS, *more])]

    return of


@pytest.fixture(scope="module")
def expected(options, tmp_path_factory):
    """The losses of two steps of each method in one process."""
    losses = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp("one")
        given = options(method, folder, "--max_steps", 2, "--per_device_train_batch_size", 2, "--save_strategy", "no")
        history = finetune.finetune(*parse_arguments(given)).state.log_history
        losses[method] = [log["loss"] for log in history if "loss" in log]
    return losses


@pytest.mark.parametrize(
    ("name", "wrapper"), [("fsdp2", "FSDPVideoNSA"), ("zero2", "DeepSpeedEngine"), ("zero3", "DeepSpeedEngine")]
)
def test_a_configuration_trains_saves_and_resumes(name, wrapper, options, expected, tiny_repository, tmp_path):
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not among the extras: pip install deepspeed (it needs a C++ compiler)")
    if name.startswith("zero") and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its communication on a CPU, and there is no C++ compiler")
    runs = [options("full", tmp_path / "full", "--max_steps", 1, "--save_steps", 1)]
    for method in METHODS:
        resumed = ["--resume_from_checkpoint", "last"] if method == "full" else []
        runs.append(options(method, tmp_path / method, "--max_steps", 2, "--save_steps", 2, *resumed))
    if name == "fsdp2":
        both = ["--sequence_parallel", 2, "--per_device_train_batch_size", 2]
        for method in ("full", "lora"):
            runs.append(options(method, tmp_path / f"{method}-together", "--max_steps", 2, "--save_steps", 2, *both))

    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(EXAMPLES / f"accelerate/{name}.yaml"), str(tmp_path / "program.py")]
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([*command, json.dumps(runs)], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"trained by {wrapper}") >= 2

    folders = [(tmp_path / method, method, parts) for method, parts in METHODS.items()]
    if name == "fsdp2":
        folders += [(tmp_path / f"{method}-together", method, METHODS[method]) for method in ("full", "lora")]
    for folder, method, parts in folders:
        history = json.loads((folder / "checkpoint-2/trainer_state.json").read_text())["log_history"]
        losses = [log["loss"] for log in history if "loss" in log]
        assert losses == pytest.approx(expected[method], rel=0.01), method
        model = VideoNSAForConditionalGeneration.from_pretrained(folder)  # with all of its weights
        before = VideoNSAForConditionalGeneration.from_pretrained(tiny_repository).state_dict()
        # DeepSpeed keeps the weights in bf16, which rounds all of them.
        same = {name: torch.allclose(x, before[name], rtol=2**-8, atol=1e-6) for name, x in model.state_dict().items()}
        changed = {name for name in same if not same[name]}
        assert {part_of(name) for name in changed} == parts, method
