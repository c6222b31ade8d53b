"""finetune.py resumes a run where it stopped, and refuses what would not be the same run."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from trainings import losses, weights
from transformers import TrainerCallback

import finetune
from finetune import parse_arguments
from lib import resuming
from lib.interruption import Interrupted
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration


@pytest.mark.parametrize(
    ("method", "repository", "steps"),
    [("full", "tiny_repository", (2, 4)), ("lora", "tiny_repository", (2, 4)), ("lora", "qwen3_repository", (2,))],
)
def test_a_resumed_run_is_the_uninterrupted_one(request, train, method, repository, steps):
    model = request.getfixturevalue(repository)
    options = ["--method", method, "--num_train_epochs", 2, "--learning_rate", 1e-3, "--lora_dropout", 0.3]
    options += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--report_to", "none", "--save_steps", 2]
    options += ["--dataloader_num_workers", 1]
    # 12 samples: 3 steps per epoch; resumed in the middle of both.
    whole, folder, _ = train(*options, model=model)
    for step in steps:
        resume = ["--resume_from_checkpoint", folder / f"checkpoint-{step}"]
        resumed, again, _ = train(*options, *resume, output=f"r{step}", model=model)
        assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
        for name, tensor in weights(again).items():
            assert torch.equal(tensor, weights(folder)[name]), name


def test_an_interrupted_run_goes_on_from_its_last_checkpoint_on_the_same_data_only(train, needles, tmp_path):
    options = ["--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--save_steps", 2]
    train("--max_steps", 2, *options)
    with pytest.raises(ValueError, match="holds checkpoint-2: resume it with --resume_from_checkpoint last"):
        train("--max_steps", 4, *options)
    again = ["--max_steps", 4, "--resume_from_checkpoint", "last", *options]
    with pytest.raises(ValueError, match="12 samples then, 6 now"):
        train(*again, data=f"{needles / 'train.json'}%50")
    with pytest.raises(ValueError, match="the checkpoint was trained with method full, not gates"):
        train(*again, "--method", "gates")
    with pytest.raises(ValueError, match=r"with parts .*'merger'\], not \['gates', 'language', 'merger', 'vision'\]"):
        train("--resume_from_checkpoint", tmp_path / "out/checkpoint-2", *options, "--train_vision", output="new")
    trainer, folder, _ = train(*again)
    assert trainer.state.global_step == 4
    before = weights(folder)
    trainer, _, _ = train(*again)  # at its end: no step is left
    assert trainer.state.global_step == 4
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, before[name]), name

    # A half-written checkpoint is left out.
    (folder / "checkpoint-4/trainer_state.json").unlink()
    trainer, _, printed = train(*again)
    assert "resumed from checkpoint-2; checkpoint-4 is not complete: trainer_state.json" in printed
    assert trainer.state.global_step == 4
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, before[name]), name

    with pytest.raises(ValueError, match="there is no checkpoint in"):
        train(*again, output="empty")
    with pytest.raises(ValueError, match="must be a folder or last"):
        train("--resume_from_checkpoint", tmp_path / "gone", *options, output="new")


@pytest.mark.parametrize(
    ("signum", "to_all", "options"),
    [
        (signal.SIGINT, True, ["--dataloader_num_workers", 2]),
        (signal.SIGTERM, True, ["--dataloader_num_workers", 2, "--eval_strategy", "epoch", "--save_strategy", "epoch"]),
        (signal.SIGTERM, False, ["--enable_jit_checkpoint", "--save_only_model", "--save_strategy", "no"]),
    ],
    ids=["Ctrl-C", "SIGTERM to all processes", "SIGTERM"],
)
def test_an_interrupted_training_saves_a_checkpoint_and_publishes_nothing(
    tiny_repository, needles, tmp_path, signum, to_all, options
):
    output = tmp_path / "out"
    given = ["--model", tiny_repository, "--train_data", needles / "train.json", "--output_dir", output, "--max_steps"]
    given += [1000, "--eval_data", needles / "validation.json", "--report_to", "none", "--logging_steps", 1, *options]
    given = [str(ROOT / "examples/finetune.py"), *map(str, given)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *given], **pipes)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "'loss'" in line:
            (os.killpg if to_all else os.kill)(process.pid, signum)
            break
    rest, errors = process.communicate(timeout=120)

    assert process.returncode == 128 + signum, errors
    assert "Traceback" not in errors
    assert "wrote" not in "".join([*printed, rest])
    (checkpoint,) = output.glob("checkpoint-*")
    assert {"checkpoint-", "dropped.jsonl", "data.json"} == {
        "checkpoint-" if path.is_dir() else path.name for path in output.iterdir()
    }
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    last = errors.splitlines()[-1]
    assert last.startswith(f"finetune.py: stopped by {signum.name} after step {step} of 1,000; saved {checkpoint}")

    _, command = last.split("Resume with: ")
    resumed = shlex.split(command)
    assert resumed == ["python", *given, "--resume_from_checkpoint", "last"]
    _, _, args = parse_arguments(resumed[2:])
    assert resuming.find_resume(args) == str(checkpoint)


def test_the_command_that_resumes_goes_on_to_the_end(tiny_repository, needles, tmp_path, monkeypatch):
    output = tmp_path / "out"
    given = ["--model", tiny_repository, "--train_data", needles / "train.json", "--output_dir", output]
    given = [*map(str, [*given, "--max_steps", 3, "--report_to", "none", "--save_strategy", "no"])]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *given])
    before = signal.getsignal(signal.SIGTERM)

    class Asked(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    build = finetune.VideoTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            finetune.VideoTrainer, "__init__", lambda self, **options: build(self, **options, callbacks=[Asked()])
        )
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 2 of 3; saved") as stopped:
            finetune.finetune(*parse_arguments(given))
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert not (output / "config.json").exists()

    command = shlex.split(str(stopped.value).split("Resume with: ")[1])
    trainer = finetune.finetune(*parse_arguments(command[2:]))
    assert trainer.state.global_step == 3 and (output / "config.json").is_file()


@pytest.fixture
def checkpoint(tiny_repository, tmp_path):
    """A checkpoint as Trainer writes it, with the model's weights and too little else to be trained on."""
    folder = tmp_path / "run/checkpoint-2"
    shutil.copytree(tiny_repository, folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    VideoNSAForConditionalGeneration.from_pretrained(tiny_repository).save_pretrained(folder)
    torch.save({"step": 2}, folder / "optimizer.pt")
    torch.save({"step": 2}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    return folder


def resume(checkpoint, *options, asked="last"):
    """What find_resume says of the folder of a checkpoint."""
    given = ["--model", "m", "--train_data", "d", "--output_dir", checkpoint.parent, "--resume_from_checkpoint", asked]
    return resuming.find_resume(parse_arguments([*map(str, [*given, *options])])[2])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "is not complete: optimizer.pt missing or damaged"),
        (lambda folder: cut(folder / "optimizer.pt"), "is not complete: optimizer.pt missing or damaged"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "is not complete: scheduler.pt missing"),
        (lambda folder: cut(folder / "trainer_state.json"), "is not complete: trainer_state.json missing"),
        (lambda folder: cut(folder / "model.safetensors"), "is not complete: model.safetensors missing"),
        (
            lambda folder: [(folder / f"{name}.pt").unlink() for name in ("optimizer", "scheduler")],
            r"is not complete: scheduler.pt, optimizer.pt missing or damaged \(--save_only_model saves neither",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "is not complete: adapter_model.safetensors missing",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"w": "model-1-of-2"}}'
            ),
            "is not complete: model-1-of-2 missing",
        ),
    ],
)
def test_a_checkpoint_that_lacks_state_is_not_resumed(checkpoint, damage, message, capsys):
    assert resume(checkpoint) == resume(checkpoint, asked=checkpoint) == str(checkpoint)
    newer = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-10"))
    damage(newer)
    with pytest.raises(ValueError, match=f"checkpoint-10 {message}"):
        resume(checkpoint, asked=newer)
    assert capsys.readouterr().out == ""
    assert resume(checkpoint) == str(checkpoint)
    assert "resumed from checkpoint-2; checkpoint-10 is not complete" in capsys.readouterr().out
    damage(checkpoint)
    with pytest.raises(ValueError, match="checkpoint-10 is not complete: .*; nor are 1 older ones"):
        resume(checkpoint)


def test_a_checkpoint_of_deepspeed_is_resumed_by_as_many_processes_under_deepspeed_only(checkpoint, monkeypatch):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "global_step2").mkdir()
    for rank in range(2):
        (checkpoint / f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="checkpoint-2 is of DeepSpeed: resume it with the same accelerate config"):
        resume(checkpoint)

    args = SimpleNamespace(deepspeed_plugin=object(), world_size=2)
    assert resuming.why_not_resumed(checkpoint, args) is None
    args.world_size = 4
    assert "is of 2 processes under DeepSpeed" in resuming.why_not_resumed(checkpoint, args)
    shutil.rmtree(checkpoint / "global_step2")
    assert "global_step*/*_optim_states.pt missing" in resuming.why_not_resumed(checkpoint, args)


LORA = ["--method", "lora"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nsa_variant", "released"], "nsa_variant paper, not released"),
        (["--block_size", "32", "--window_size", "33"], "block_size 16, not 32; window_size 20, not 33"),
        (["--gate_temperature", "0.5"], "gate_temperature 1.0, not 0.5"),
        ([*LORA, "--lora_alpha", "64"], "lora_alpha 32, not 64"),
        ([*LORA, "--lora_rank", "8"], "lora_rank 16, not 8"),
        (["--dtype", "bfloat16"], "dtype auto, not bfloat16"),
        (["--gate_learning_rate", "1"], "gate_learning_rate None, not 1.0"),
        (["--weight_decay", "0.1"], "weight_decay 0.0, not 0.1"),
        (["--seed", "1"], r"\(3 samples then, 3 now; seed 42 then, 1 now\), .* --ignore_data_skip starts it over"),
        (["--per_device_train_batch_size", "2"], "batch 1 then, 2 now"),
        (["--packing"], "packing False then, True now"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(tiny_repository, tmp_path, options, message):
    def check(*options, resume=None):
        given = ["--model", tiny_repository, "--train_data", "d", "--output_dir", tmp_path, *options]
        model, data, args = parse_arguments([*map(str, given)])
        samples = [SimpleNamespace(id=i, tokens=9) for i in range(3)]
        data = resuming.describe_data(
            samples,
            packing=data.packing,
            max_length=data.max_length,
            seed=args.seed,
            batch=args.per_device_train_batch_size,
        )
        kept = finetune.run_options(model, finetune.load_config(model), args)
        resuming.check_options(kept, data, args, resume)

    check(*options[: 2 * (options[:2] == LORA)])
    resume = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=message) as error:
        check(*options, resume=resume)
    assert "\n" not in str(error.value)
    free = ["--logging_steps", 3, "--num_train_epochs", 9, "--attn_implementation", "eager"]
    check(*options[: 2 * (options[:2] == LORA)], *free, resume=resume)
    (tmp_path / "data.json").unlink()
    with pytest.raises(ValueError, match="data.json is missing, which says how checkpoint-2 was trained"):
        check(*options, resume=resume)


def test_a_checkpoint_with_other_weights_than_the_model_is_refused(checkpoint, tiny_repository):
    model = VideoNSAForConditionalGeneration.from_pretrained(tiny_repository)
    file = checkpoint / "model.safetensors"
    saved = load_file(file)
    resuming.check_weights(model, checkpoint)
    # Under ZeRO-3, transformers wrote "model" more than once.
    save_file({name.replace("model.", "model.model.", 1): x for name, x in saved.items()}, file)
    resuming.check_weights(model, checkpoint)

    lost = {name: x for name, x in saved.items() if "layers.1.mlp" not in name}
    wrong = "checkpoint-2 does not hold the weights of this model: "
    for tensors, message in (
        (lost, r"3 are not in it, such as model\.language_model\.layers\.1\.mlp"),
        ({**saved, "model.layers.7.norm.weight": torch.ones(2)}, "1 are not of the model, such as .*layers.7.norm"),
        ({**saved, "model.norm.weight": torch.ones(2)}, "size mismatch for model.language_model.norm.weight"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=wrong + message):
            resuming.check_weights(model, checkpoint)
