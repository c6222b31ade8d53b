"""finetune.py as a user runs it: short trainings of a miniature model on generated clips and on the real one."""

import inspect
import json
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
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser, TrainerCallback

import finetune
from finetune import DataArguments, FinetuneArguments, ModelArguments, parse_arguments
from lib import resuming
from lib.interruption import Interrupted
from lib.observe import BRANCHES
from lib.training import part_of
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
REAL = ROOT.parent / "shared/clips/annotations.json"
QUICK = ["--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--save_strategy", "no"]


def answer(model, processor, clip) -> list[int]:
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


GENERATE = f"""
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

{inspect.getsource(answer)}
folder, clip = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print(answer(model, processor, clip), processor.video_processor.fps)
"""


@pytest.fixture
def train(tiny_repository, needles, tmp_path, capsys):
    """Runs the script in this process and returns (trainer, output folder, what it printed)."""

    def run(*options, data=None, output="out", model=tiny_repository):
        folder = tmp_path / output
        data = needles / "train.json" if data is None else data
        given = ["--model", model, "--train_data", data, "--output_dir", folder, *options]
        capsys.readouterr()
        trainer = finetune.finetune(*parse_arguments([*map(str, given)]))
        return trainer, folder, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def clip(needles):
    return next((needles / "test").glob("*.mp4"))


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def changed_parts(before, after) -> set[str]:
    before, after = weights(before), weights(after)
    assert set(before) == set(after)
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def generate_like(trainer, folder, clip, run_fresh) -> None:
    """The folder alone generates, in a fresh process, what the trained model generates here."""
    expected = answer(trainer.model.eval(), trainer.processing_class, str(clip))
    assert run_fresh(GENERATE, folder, clip).startswith(f"{expected} ")


def test_full_training_through_the_script_saves_a_repository_that_generates(
    tiny_repository, needles, clip, tmp_path, run_fresh
):
    output = tmp_path / "out"
    command = ["--model", tiny_repository, "--train_data", needles / "train.jsonl", "--output_dir", output]
    command += ["--eval_data", needles / "validation.json", "--eval_strategy", "steps", "--eval_steps", 2]
    command += ["--max_steps", 4, "--save_steps", 4, "--logging_steps", 2, "--learning_rate", 1e-3, "--fps", 1]
    command += ["--max_pixels", 112 * 112]
    command += ["--train_vision", "--bf16", "--gradient_checkpointing"]
    if REAL.exists():
        command[3:4] = [needles / "train.jsonl", f"{REAL}%100"]
        command += ["--media_root", needles, REAL.parent, needles]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"train: {12 + REAL.exists()} samples, 0 dropped" in done.stdout
    assert "trained: vision 0.06 M, merger 0.03 M, language 0.24 M, gates 0.03 M" in done.stdout
    assert changed_parts(tiny_repository, output) == {"vision", "merger", "language", "gates"}
    history = json.loads((output / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert history[-1]["eval_loss"] < history[1]["eval_loss"]
    first = history[0]
    assert first["tokens_per_second"] > 0 and 0.4 < first["gate_selection"] < 0.6
    assert {f"gate_{branch}/layer_01" for branch in BRANCHES} <= set(first)
    for folder in (output, output / "checkpoint-4"):
        assert {"config.json", "modeling_videonsa.py", "nsa_torch.py", "processing_videonsa.py", "tokenizer.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    card = (output / "README.md").read_text()
    assert f"{12 + REAL.exists()} samples, 4 steps of 1" in card and "base_model" not in card
    printed = run_fresh(GENERATE, output, clip)
    assert printed.rstrip().endswith("] 1.0")  # the processor has the sampling of the training


def test_tensorboard_gets_loss_speed_and_gates(train):
    _, folder, _ = train("--max_steps", 2, "--logging_steps", 1, "--dataloader_num_workers", 0, "--save_strategy", "no")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/tokens_per_second", "train/gate_window", "train/gate_window/layer_00"} <= set(tags)
    assert len(events.Scalars("train/gate_compression/layer_01")) == 2


def test_lora_saves_an_adapter_with_gates_and_a_merged_model(train, tiny_repository, clip, run_fresh):
    rates = ["--learning_rate", 1e-2, "--gate_learning_rate", 3e-2]
    trainer, folder, _ = train("--method", "lora", "--max_steps", 3, "--gradient_checkpointing", *rates, *QUICK)
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    names = {name.split(".")[-2] for name in adapter}
    assert {"g_proj_1", "g_proj_2", "lora_A", "lora_B"} <= names
    assert not list(folder.rglob("*.bin"))  # pickles
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_repository
    )
    assert changed_parts(tiny_repository, folder) == {"language", "gates", "merger"}

    feature = trainer.train_dataset[0][0]
    batch = {k: v for k, v in trainer.data_collator([[feature]]).items() if k != "labels"}
    base = VideoNSAForConditionalGeneration.from_pretrained(tiny_repository)
    merged = VideoNSAForConditionalGeneration.from_pretrained(folder)
    trained = trainer.model.eval()
    with torch.no_grad():
        expected = trained(**batch).logits
        reloaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
        torch.testing.assert_close(reloaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged.eval()(**batch).logits, expected, rtol=1e-3, atol=1e-3)
    generate_like(trainer, folder, clip, run_fresh)


def test_gates_only_trains_nothing_else(train, tiny_repository, clip, run_fresh):
    options = ["--method", "gates", "--max_steps", 2, "--learning_rate", 1e-2]
    trainer, folder, printed = train(*options, "--bf16", *QUICK)
    assert "trained: gates 0.03 M\n" in printed
    assert changed_parts(tiny_repository, folder) == {"gates"}
    generate_like(trainer, folder, clip, run_fresh)


def test_parts_are_frozen_and_have_rates_of_their_own(train, tiny_repository):
    rates = {"learning_rate": 1e-3, "gate_learning_rate": 1e-2, "merger_learning_rate": 1e-4}
    options = [x for name, rate in rates.items() for x in (f"--{name}", rate)]
    trainer, folder, _ = train("--max_steps", 1, "--no_train_language", "--train_vision", *options, *QUICK)
    assert changed_parts(tiny_repository, folder) == {"merger", "vision", "gates"}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = {
        (part_of(names[p]), group["initial_lr"]) for group in trainer.optimizer.param_groups for p in group["params"]
    }
    assert found == {("gates", 1e-2), ("merger", 1e-4), ("vision", 1e-3)}
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0}  # the Trainer's default
    count = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert count == sum(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(train, method):
    options = ["--method", method, "--num_train_epochs", 2, "--learning_rate", 1e-3, "--lora_dropout", 0.3]
    options += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--report_to", "none", "--save_steps", 2]
    options += ["--dataloader_num_workers", 1]
    whole, folder, _ = train(*options)  # 12 samples: 3 steps per epoch; resumed in the middle of both
    for step in (2, 4):
        resumed, again, _ = train(
            *options, "--resume_from_checkpoint", folder / f"checkpoint-{step}", output=f"r{step}"
        )
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
    given = [str(EXAMPLES / "finetune.py"), *map(str, given)]
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
    given = [*map(str, [*given, "--max_steps", 3, *QUICK])]
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


def mixed_data(needles, path) -> Path:
    """The training clips and stills with texts without media between them, so that processes get different kinds."""
    records = json.loads((needles / "train.json").read_text())
    for record in records:
        kind = "video" if "video" in record else "image"
        record[kind] = str(needles / record[kind])
    texts = [
        {"conversations": [{"from": "human", "value": f"Hello {i}?"}, {"from": "gpt", "value": "Yes. " * (i + 1)}]}
        for i in range(8)
    ]
    path.write_text(json.dumps([record for pair in zip(texts, records, strict=False) for record in pair]))
    return path


def test_two_processes_and_accumulation_train_like_one(train, tiny_repository, needles, tmp_path):
    data = mixed_data(needles, tmp_path / "mixed.json")
    options = ["--max_steps", 3, "--learning_rate", 1e-3, "--train_vision", "--gradient_checkpointing"]
    # 3 samples: processes would get one of them twice.
    options += ["--eval_data", f"{needles / 'validation.json'}%75", "--eval_strategy", "steps", "--eval_steps", 3]
    options += QUICK
    for packing in ([], ["--packing", "--max_length", 450]):
        size = 2 if packing else 4
        one, folder, _ = train(
            *options, *packing, "--per_device_train_batch_size", size, data=data, output=f"one{size}"
        )
        parts = ["--per_device_train_batch_size", size // 2, "--gradient_accumulation_steps", 2]
        accumulated, _, _ = train(*options, *packing, *parts, data=data, output=f"parts{size}")
        output = tmp_path / f"two{size}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        command += [EXAMPLES / "finetune.py", "--model", tiny_repository, "--train_data", data, "--output_dir", output]
        command += [*options, *packing, "--per_device_train_batch_size", size // 2]
        # The last argument of a kind counts: checkpoints hold the losses.
        command += ["--save_strategy", "steps", "--save_steps", 3]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        (state,) = output.glob("checkpoint-*/trainer_state.json")
        history = json.loads(state.read_text())["log_history"]
        two = [log["loss"] for log in history if "loss" in log]
        assert len(two) == len(losses(one)) == 3
        assert two == pytest.approx(losses(one), rel=1e-4)
        assert losses(accumulated) == pytest.approx(losses(one), rel=1e-4)
        evaluated = [
            [log["eval_loss"] for log in logs if "eval_loss" in log] for logs in (history, one.state.log_history)
        ]
        assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
        for name, tensor in weights(output).items():
            torch.testing.assert_close(tensor, weights(folder)[name], rtol=1e-3, atol=1e-3)


SHARDED = """
import sys
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor

from lib.data import Collator, ConversationDataset, load_samples
from lib.training import unsharded_class

folder, file, saved = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
samples, _ = load_samples([file], processor)
dataset = ConversationDataset(samples, processor, max_length=9999)
video, image = (next(i for i, s in enumerate(samples) if kind in s.record) for kind in ("video", "image"))
text = next(i for i, s in enumerate(samples) if not s.vision_tokens)
collate = Collator(processor, always_vision=True)

def load():
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).train()

alone, sharded = load(), load()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for layer in (*sharded.model.visual.blocks, *sharded.model.language_model.layers):
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
for mine in ([[text], [video, image]], [[video], [text]], [[image], [video]], [[video, video], [video]]):
    batch = collate([dataset[i] for i in mine[rank]])
    losses = [model(**batch, use_cache=False).loss for model in (alone, sharded)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    if rank == 0:
        print("equal", flush=True)
if rank == 0:
    with unsharded_class(sharded):
        sharded.save_pretrained(saved, state_dict=alone.state_dict())
"""


def test_sharded_processes_with_different_media_do_not_wait_for_each_other(tiny_repository, needles, tmp_path):
    program, data = tmp_path / "sharded.py", mixed_data(needles, tmp_path / "mixed.json")
    program.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += [program, tiny_repository, data, tmp_path / "saved"]
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 4
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {
        path.name for path in tiny_repository.glob("*.py") if not path.name.startswith(("processing", "qwen", "video"))
    }
    before, after = weights(tiny_repository), weights(tmp_path / "saved")
    assert set(before) == set(after)


def test_gates_are_logged_as_the_model_has_them(train):
    trainer, _, _ = train("--max_steps", 1, "--learning_rate", 0.0, "--per_device_train_batch_size", 3, *QUICK)
    logged = trainer.state.log_history[0]
    model = trainer.model.train()
    indices = list(trainer.get_train_dataloader().batch_sampler)[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in indices])
    gates = model(**batch, output_gates=True).gates
    vision = model.model.token_types(batch["input_ids"]) > 0
    for i, layer in enumerate(gates):
        for branch, mean in zip(BRANCHES, layer[vision].mean((0, 1)).tolist(), strict=True):
            assert logged[f"gate_{branch}/layer_{i:02}"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("variant", ["dense", "released"])
def test_another_variant_trains_and_is_kept(train, variant):
    _, folder, _ = train("--nsa_variant", variant, "--window_size", 99, "--max_steps", 1, *QUICK)
    config = VideoNSAForConditionalGeneration.from_pretrained(folder).config
    assert (config.nsa_variant, config.window_size, config.block_count) == (variant, 99, 3)


def test_drops_are_listed_and_training_goes_on(train, needles, tmp_path, clip):
    broken = tmp_path / "broken.mp4"
    whole = clip.read_bytes()
    start, moov = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    broken.write_bytes(whole[:start] + bytes(moov - start) + whole[moov:])  # only decoding finds it

    def record(video):
        return {
            "video": video,
            "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "a"}],
        }

    data = tmp_path / "data.json"
    data.write_text(json.dumps([record(str(broken)), record("gone.mp4"), record(str(clip)), *[record("x.mp4")] * 12]))
    trainer, folder, printed = train("--num_train_epochs", 2, *QUICK, data=data)
    assert "train: 2 samples, 13 dropped" in printed
    assert "dropped data.json[1]: missing file: gone.mp4" in printed and "in all: 13 × missing file" in printed
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 13 and dropped[0]["split"] == "train"
    assert trainer.state.global_step == 4
    assert "1 samples could not be read and were skipped" in printed
    assert "broken.mp4" in (folder / "skipped.jsonl").read_text()
    data.write_text(json.dumps([record(str(clip))]))
    _, _, printed = train("--max_steps", 1, *QUICK, data=data)  # in the same folder
    assert "skipped" not in printed and not (folder / "skipped.jsonl").exists()
    data.write_text(json.dumps([record("gone.mp4")]))
    with pytest.raises(ValueError, match="--train_data: no sample can be used"):
        train(*QUICK, data=data, output="none")


def test_a_dry_run_tells_tokens_drops_and_time_and_saves_nothing(train, needles, tmp_path):
    options = ["--dry_run", "--packing", "--max_length", 600, "--num_train_epochs", 50, "--dataloader_num_workers", 0]
    _, folder, printed = train(*options)
    assert "tokens per sample: " in printed and "% of them vision" in printed
    assert "packing: 12 samples in " in printed and "time per epoch: " in printed
    assert not folder.exists()


def test_push_to_hub_makes_the_repository_first_and_uploads_the_folder_last(train, monkeypatch):
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create", repo_id))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})()

    def upload_folder(self, repo_id, folder_path, revision, ignore_patterns, **kwargs):
        assert "checkpoint-*" in ignore_patterns and (Path(folder_path) / "config.json").exists()
        calls.append(("upload", repo_id, revision))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    push = ["--push_to_hub", "--hub_model_id", "new", "--hub_revision", "dev", "--max_steps", 1, *QUICK]
    _, folder, printed = train(*push)
    assert calls == [("create", "new"), ("upload", "me/new", "dev")]
    assert 'repo = "me/new"' in (folder / "README.md").read_text() and "pushed to me/new" in printed

    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: (_ for _ in ()).throw(OSError("503")))
    again = r"the upload failed: 503\nresume it with: hf upload me/new .*kept . --revision dev '--exclude=checkpoint-"
    with pytest.raises(ValueError, match=again):
        train(*push, output="kept")
    assert (folder.parent / "kept/model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval_strategy", "steps"], "--eval_strategy .*needs --eval_data"),
        (["--method", "lora", "--no_train_language"], "--method lora needs --train_language or --train_vision"),
        (["--clip_frames", "5"], "--clip_frames must be two numbers"),
        (["--media_root", "a", "b"], "--media_root must name one folder, or one for each data file, got 2"),
        (["--config", "gone.yaml"], "--config must be a file, got gone.yaml"),
        (["--block_size", "24"], "block_size must be a power of two"),
        (["--nsa_variant", "merged"], "block_count must be at least 4"),
        (["--method", "gates", "--nsa_variant", "dense"], "nothing would be trained: .*--method gates.*--nsa_variant"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor must be 0, got 0.1"),
        (["--train_sampling_strategy", "group_by_length"], "must be random or sequential, got group_by_length"),
        (["--hub_strategy", "every_save"], "--hub_strategy must be end, got every_save"),
    ],
)
def test_wrong_options_are_named(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(*options, *QUICK)


def test_a_model_is_not_overwritten_and_several_gpus_need_a_launcher(train, tiny_repository, monkeypatch):
    with pytest.raises(ValueError, match="--output_dir must not be --model, which it would overwrite, got .*tiny"):
        train(*QUICK, output=tiny_repository)
    monkeypatch.setattr(FinetuneArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="sees 2 GPUs: start it with accelerate launch .*CUDA_VISIBLE_DEVICES=0"):
        train(*QUICK)


def test_a_stock_model_is_refused_with_what_to_do(train, stock_checkpoint, monkeypatch, needles, tmp_path):
    options = ["--model", stock_checkpoint, "--train_data", needles / "train.json", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, options)])
    with pytest.raises(SystemExit, match="finetune.py: --model .* make one with: python examples/convert.py"):
        finetune.main()


def test_the_paper_recipe_is_what_the_paper_states(tmp_path):
    required = ["--model", "m", "--train_data", "d.json", "--output_dir", str(tmp_path)]
    recipe = EXAMPLES / "recipes/paper.yaml"
    model, data, args = parse_arguments(["--config", str(recipe), *required, "--learning_rate", "2e-6"])
    assert (data.fps, data.max_pixels, data.clip_frames, data.max_length) == (4, 50176, [350, 550], 36864)
    assert (model.block_size, model.block_count, model.window_size, model.method) == (64, 32, 256, "full")
    assert args.learning_rate == 2e-6  # the command line goes before the file
    copy = tmp_path / "copy.yaml"
    copy.write_text(f"{recipe.read_text()}\nmax_frames: null\n")
    again = parse_arguments([f"--config={copy}", *required, "--learning_rate", "2e-6"])
    assert again[:2] == (model, data) and again[2].learning_rate == 2e-6 and data.max_frames is None
    values = yaml.safe_load(recipe.read_text())
    assert values["learning_rate"] == 1e-6
    parser = HfArgumentParser((ModelArguments, DataArguments, FinetuneArguments))
    parsed = parser.parse_dict({**values, "model": "m", "train_data": ["d.json"], "output_dir": str(tmp_path)})
    assert parsed[2].learning_rate == 1e-6 and parsed[2].bf16


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    printed = capsys.readouterr().out
    assert "the processor's) (default" not in " ".join(printed.split())  # once
    for group in (ModelArguments, DataArguments, FinetuneArguments):
        for name, field in group.__dataclass_fields__.items():
            if field.init and not name.startswith("_"):
                assert f"--{name}" in printed
    for group in (ModelArguments, DataArguments):
        assert all(field.metadata.get("help") for field in group.__dataclass_fields__.values())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_configs_are_read(name):
    config = load_config_from_file(str(EXAMPLES / f"accelerate/{name}.yaml"))
    assert config.num_processes == 8 and config.num_machines == 1
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == kinds[name]
