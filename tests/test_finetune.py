"""finetune.py as a user runs it: short trainings of a miniature model on generated clips and on the real one."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import forks
import processes
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file
from trainings import losses, weights
from transformers import HfArgumentParser
from videos import REAL_ANNOTATIONS, needs_real_clip

import finetune
from finetune import DataArguments, FinetuneArguments, ModelArguments, parse_arguments
from lib.conversion import code_files
from lib.dry_run import duration
from lib.observe import BRANCHES
from lib.training import part_of
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
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
video = processor.video_processor
print(answer(model, processor, clip), video.fps, video.max_tokens)
"""


@pytest.fixture(scope="module")
def clip(needles):
    return next((needles / "test").glob("*.mp4"))


def changed_parts(before, after) -> set[str]:
    before, after = weights(before), weights(after)
    assert set(before) == set(after)
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def generate_like(trainer, folder, clip, run_fresh) -> None:
    """The folder alone generates, in a fresh process, what the trained model generates here."""
    expected = answer(trainer.model.eval(), trainer.processing_class, str(clip))
    assert run_fresh(GENERATE, folder, clip).startswith(f"{expected} ")


@pytest.mark.parametrize(
    "real", [0, pytest.param(1, marks=needs_real_clip)], ids=["generated clips", "the real one too"]
)
def test_full_training_through_the_script_saves_a_repository_that_generates(
    tiny_repository, needles, clip, tmp_path, run_fresh, real
):
    output = tmp_path / "out"
    command = ["--model", tiny_repository, "--train_data", needles / "train.jsonl", "--output_dir", output]
    command += ["--eval_data", needles / "validation.json", "--eval_strategy", "steps", "--eval_steps", 2]
    command += ["--max_steps", 4, "--save_steps", 4, "--logging_steps", 2, "--learning_rate", 1e-3, "--fps", 1]
    command += ["--max_pixels", 112 * 112, "--max_tokens", 4096]
    command += ["--train_vision", "--bf16", "--gradient_checkpointing"]
    if real:
        command[3:4] = [needles / "train.jsonl", f"{REAL_ANNOTATIONS}%100"]
        command += ["--media_root", needles, REAL_ANNOTATIONS.parent, needles]
    done = forks.run(EXAMPLES / "finetune.py", *command)
    assert done.returncode == 0, done.stderr
    assert f"train: {12 + real} samples, 0 dropped" in done.stdout
    assert "trained: vision 0.06 M, merger 0.03 M, language 0.24 M, gates 0.03 M" in done.stdout
    assert changed_parts(tiny_repository, output) == {"vision", "merger", "language", "gates"}
    history = json.loads((output / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history] == [1, 2, 2, 4, 4]  # the first step is logged, too
    assert history[-1]["eval_loss"] < history[2]["eval_loss"]
    first = history[0]
    assert first["tokens_per_second"] > 0 and 0.4 < first["gate_selection"] < 0.6
    assert {f"gate_{branch}/layer_01" for branch in BRANCHES} <= set(first)
    # The newest transformers warns of this old name.
    assert "gradient_checkpointing" not in done.stderr
    for folder in (output, output / "checkpoint-4"):
        assert {"config.json", "modeling_videonsa.py", "nsa_torch.py", "processing_videonsa.py", "tokenizer.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    card = (output / "README.md").read_text()
    assert f"{12 + real} samples, 4 steps of 1" in card and "base_model" not in card
    printed = run_fresh(GENERATE, output, clip)
    assert printed.rstrip().endswith("] 1.0 4096")  # the processor has the sampling of the training


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
    code = {path.name for path in code_files()}
    assert {path.name for path in folder.glob("*.py")} == code
    assert "video_chat.py" in code  # the card imports it, the model does not
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
        command = [EXAMPLES / "finetune.py", "--model", tiny_repository, "--train_data", data, "--output_dir", output]
        command += [*options, *packing, "--per_device_train_batch_size", size // 2]
        # The last argument of a kind counts: checkpoints hold the losses.
        command += ["--save_strategy", "steps", "--save_steps", 3]
        if packing:
            processes.run(processes.script, 2, *command)
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
            done = subprocess.run([*map(str, launch + command)], capture_output=True, text=True, timeout=200)
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
    printed = processes.run(processes.script, 2, program, tiny_repository, data, tmp_path / "saved")
    assert printed.count("equal") == 4
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {
        path.name
        for path in tiny_repository.glob("*.py")
        if not path.name.startswith(("processing", "qwen", "video")) and "qwen3" not in path.name
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
    for options in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="2 of the first 4 records .* --max_dropped 0.1 allows of 15"):
            train(*options, *QUICK, data=data)
    allow = ["--max_dropped", 0.9]
    trainer, folder, printed = train("--num_train_epochs", 2, *allow, *QUICK, data=data)
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
        train("--max_dropped", 1, *QUICK, data=data, output="none")


@pytest.mark.parametrize("packing", [[], ["--packing", "--max_length", 600]], ids=["samples", "packs"])
def test_a_dry_run_tells_tokens_drops_memory_and_time_and_saves_nothing(train, packing, monkeypatch):
    options = ["--dry_run", *packing, "--num_train_epochs", 50, "--dataloader_num_workers", 0]
    if packing:
        options += ["--gradient_accumulation_steps", 2]
    trainer, folder, printed = train(*options)
    assert "tokens per sample: " in printed and "% of them vision" in printed
    assert ("packing: 12 samples in " in printed) == bool(packing)
    (memory,) = re.findall(r"memory of the process: ([\d.]+) GiB at most, .*up to ([\d,]+) tokens", printed)
    assert 0.1 < float(memory[0]) < 30
    assert re.search(r"time per epoch: [\d,]+ steps × [\d.]+ (ms|s) = [1-9][\d.]* (ms|s|min) \(3 steps", printed)
    assert not folder.exists() and trainer.state.global_step == 5

    # The first and the last step take the longest.
    trained, whole = trainer.train_dataset, trainer.train_dataset.dataset.lengths()
    lengths = [whole[i] for i in trained.indices]
    step = 2 if packing else 1
    longest = sorted(whole)[-step:][::-1]
    assert len(lengths) == 5 * step and lengths[:step] == lengths[-step:] == longest
    assert int(memory[1].replace(",", "")) == longest[0]

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(finetune.VideoTrainer, "training_step", fail)
    message = rf"out of memory on samples or packs of up to {longest[0]:,} tokens.* lower --max_length.*9 GiB\)$"
    with pytest.raises(ValueError, match=message):
        train(*options)


@pytest.mark.parametrize(("seconds", "text"), [(0.0042, "4.2 ms"), (6.24, "6.2 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_a_time_has_a_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text


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
    push = ["--push_to_hub", "--hub_model_id", "new", "--hub_revision", "dev"]
    push += ["--method", "lora", "--max_steps", 1, *QUICK]
    _, folder, printed = train(*push)
    assert calls == [("create", "new"), ("upload", "me/new", "dev")]
    # Scripts take an adapter from a folder only.
    download = 'hf download me/new --include "adapter/*" --local-dir new\n'
    assert f"{download}python examples/demo.py --model new/adapter\n" in (folder / "adapter/README.md").read_text()
    assert 'repo = "me/new"' in (folder / "README.md").read_text() and "pushed to me/new" in printed

    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: (_ for _ in ()).throw(OSError("503")))
    again = r"the upload failed: 503; resume it with: hf upload me/new .*kept . --revision dev '--exclude=checkpoint-"
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
        (["--max_dropped", "10"], "--max_dropped must be from 0 to 1, got 10.0"),
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
