"""Fine-tune a VideoNSA model on conversations about videos and images.

    python examples/finetune.py --model VideoNSA-7B --train_data clips.json --output_dir tuned --dry_run
    python examples/finetune.py --model VideoNSA-7B --train_data a.json b.jsonl%50 --output_dir tuned --method lora
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/finetune.py \\
        --config examples/recipes/paper.yaml --model VideoNSA-7B --train_data llava-video.json --output_dir tuned
    python examples/finetune.py --model VideoNSA-7B --train_data clips/ --output_dir distilled --method gates --distill

`--config` names a YAML or JSON file of options; the command line overrides it. All options of transformers'
`TrainingArguments` are options here, too. `--model` must be a VideoNSA repository (make one with `convert.py`), whose
code files run and are saved with the result. `lib/data.py` says what data may look like. `--distill` needs no answers:
the model's own dense attention teaches the sparse one (docs/distill.md).

OUTPUT_DIR becomes a repository that loads with `trust_remote_code=True`; with LoRA it holds the merged model, and
`adapter/` the adapter. Beside it stand the checkpoints, the TensorBoard logs (`runs/`), and what was not used of the
data: `dropped.jsonl` from the checks at the start, `skipped.jsonl` from reading.

Ctrl-C and SIGTERM end the training after its step: it saves a checkpoint, prints the command that resumes it, and
publishes nothing.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from huggingface_hub.utils import httpx
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.integrations import is_deepspeed_zero3_enabled

from lib.card import write_adapter_card, write_card
from lib.conversion import copy_code
from lib.data import Collator, ConversationDataset, Drop, Sample, load_samples
from lib.distill import DistillTrainer
from lib.dry_run import STEPS, choose_items, dry_run, set_dry_run
from lib.fields import MEANINGS, FieldArguments, given_fields
from lib.folders import check_source, share
from lib.interruption import Interrupted, Interruption, resume_command
from lib.loading import check_repository, find_adapter, naming
from lib.options import HelpFormatter, Underscores
from lib.qlora import check_four_bits, four_bits, make_trainable
from lib.resuming import check_options, check_weights, describe_data, find_resume
from lib.tracking import Tracking, check_trackers
from lib.training import PARTS, VideoTrainer, choose_questions, part_of, unsharded_class
from videonsa.configuration_videonsa import NSA_FIELDS

LORA_TARGETS = {
    "language": r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "vision": r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.((gate|up|down)_proj|linear_fc[12]))",
}
DISTILL_TARGETS = r".*language_model\.layers\.\d+\.self_attn\.[qkv]_proj"

USAGE = "usage: finetune.py --model MODEL --train_data DATA [DATA ...] --output_dir FOLDER [options]"
# Options in the order of --help. What is not here is of transformers' Trainer and comes last.
TOPICS = {
    "what to run": ("help", "config", "model", "output_dir", "dry_run", "resume_from_checkpoint"),
    "several processes": ("sequence_parallel",),
    "data": (
        *("train_data", "eval_data", "media_root", "max_length", "packing"),
        *("fps", "max_pixels", "max_frames", "max_tokens", "clip_frames", "max_dropped", "check_threads"),
    ),
    "method: which weights are trained, and how": (
        *("method", "distill", "start_samples", "train_language", "train_merger", "train_vision"),
        *("lora_rank", "lora_alpha", "lora_dropout", "load_in_4bit", "dtype"),
    ),
    "attention: fields of the configuration": (*MEANINGS, "attn_implementation"),
    "learning rates": ("learning_rate", "gate_learning_rate", "merger_learning_rate", "vision_learning_rate"),
    "options of the Trainer with another default": (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "logging_first_step"),
        *("dataloader_num_workers", "eval_answers", "report_to", "hub_strategy"),
    ),
}
TRAINER_TOPIC = "all other options of the Trainer"


@dataclass(kw_only=True)
class ModelArguments(FieldArguments):
    """What is trained, and with which fields of the configuration."""

    model: str = HfArg(help="folder or Hub id of a VideoNSA repository")
    method: Literal["full", "lora", "gates"] = HfArg(
        default="full",
        help="full: all weights of the trained parts; lora: low-rank adapters for them; gates: the gates alone. "
        "Every method trains and saves the gates",
    )
    distill: bool = HfArg(
        default=False,
        help="learn from the model's own dense attention, without answers, with --method gates, or lora for adapters "
        "of q, k and v, too: see docs/distill.md",
    )
    start_samples: int = HfArg(
        default=8,
        help="samples for which --distill computes the best constant gates, which new gates start as; 0 goes on with "
        "the model's gates",
    )
    train_language: bool = HfArg(default=True, help="train the language model (full, lora)")
    train_merger: bool = HfArg(default=True, help="train the merger, which maps vision to language (full, lora)")
    train_vision: bool = HfArg(default=False, help="train the vision tower (full, lora)")
    lora_rank: int = HfArg(default=16, help="rank of the adapters")
    lora_alpha: int = HfArg(default=32, help="adapter updates are scaled by lora_alpha / lora_rank")
    lora_dropout: float = HfArg(default=0.05, help="dropout before the adapters")
    load_in_4bit: bool = HfArg(
        default=False,
        help="lora: hold the language model's frozen weights in 4 bits (QLoRA), by bitsandbytes. The merged model has "
        "the weights of --model all the same",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(
        default="auto",
        help="dtype of the weights in training. auto: float32 for trained weights, so that small updates count; "
        "frozen weights keep the checkpoint's with --bf16 and --method lora or gates. bfloat16 saves memory, but "
        "loses updates below about 1/256 of a weight",
    )
    attn_implementation: str | None = HfArg(
        default=None,
        help="attention of the vision tower and of prompts without vision: sdpa, flash_attention_2, ... (default: "
        "transformers' choice). On a CPU with --bf16 and short samples, eager is twice as fast",
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    train_data: list[str] = HfArg(
        help=".json, .jsonl, .parquet or .tar files of conversations, folders of these, or ids of data sets of the "
        "Hub (ID:NAME for one of its configurations); DATA%%50 takes a random half of one"
    )
    eval_data: list[str] | None = HfArg(default=None, help="data for the loss and sample answers during training")
    media_root: list[str] | None = HfArg(
        default=None,
        help="folders that media paths are relative to: one for all files, or one for each file of train_data "
        "and then of eval_data (default: the folder of each file)",
    )
    max_length: int = HfArg(default=36864, help="most tokens of a sample or a pack; longer samples are dropped")
    packing: bool = HfArg(default=False, help="put samples together into sequences of up to max_length tokens")
    fps: float | None = HfArg(default=None, help="frames per second (default: the processor's)")
    max_pixels: int | None = HfArg(default=None, help="most pixels per frame (default: the processor's)")
    max_frames: int | None = HfArg(default=None, help="most frames of a video; longer videos are sampled more sparsely")
    max_tokens: int | None = HfArg(
        default=None,
        help="most tokens of a video with its text: frames are left out or made smaller to fit. Raise it for a "
        "--max_length above 131072 (default: the processor's)",
    )
    clip_frames: list[int] | None = HfArg(
        default=None, help="fewest and most sampled frames of a video; samples with others are dropped"
    )
    max_dropped: float = HfArg(
        default=0.1,
        help="the largest share of the records that may be dropped because they cannot be used, from 0 to 1; more is "
        "an error. What --clip_frames drops does not count",
    )
    check_threads: int = HfArg(default=16, help="media files opened at a time by the check at the start")


@dataclass
class FinetuneArguments(TrainingArguments):
    """TrainingArguments with rates per part and with defaults that suit long samples."""

    gate_learning_rate: float | None = HfArg(default=None, help="learning rate of the gates (default: --learning_rate)")
    merger_learning_rate: float | None = HfArg(
        default=None, help="learning rate of the merger (default: --learning_rate)"
    )
    vision_learning_rate: float | None = HfArg(
        default=None, help="learning rate of the vision tower (default: --learning_rate)"
    )
    sequence_parallel: int = HfArg(
        default=1,
        help="processes that share the tokens of a sample, for long ones: see docs/parallel.md. The others of all "
        "processes have other samples",
    )
    dry_run: bool = HfArg(
        default=False,
        help=f"check the data, train {STEPS} steps, the longest samples among them, print the tokens per sample, the "
        "dropped samples, the memory and the time of an epoch; save nothing",
    )
    per_device_train_batch_size: int = HfArg(default=1, help="samples or packs per process and step")
    per_device_eval_batch_size: int = HfArg(default=1, help="samples or packs per process and step in evaluation")
    logging_steps: float = HfArg(default=10, help="steps between logs; a value below 1 is a share of all steps")
    logging_first_step: bool = HfArg(default=True, help="log the first step, too")
    dataloader_num_workers: int = HfArg(default=2, help="processes that decode videos")
    eval_answers: int = HfArg(
        default=8,
        help="questions of --eval_data that the model answers at each evaluation; exact_match is the share of right "
        "answers. 0 for none; there are none under FSDP and DeepSpeed",
    )
    report_to: list[str] = HfArg(
        default_factory=lambda: ["tensorboard"], help="trackers, such as tensorboard wandb; none turns them off"
    )
    hub_strategy: str = HfArg(default="end", help="end: push after training")

    def __post_init__(self):
        for name, allowed in (
            ("hub_strategy", ("end",)),  # what the Trainer uploads itself is no repository that loads
            ("label_smoothing_factor", (0,)),  # it takes logits at all positions
            ("train_sampling_strategy", ("random", "sequential")),  # others need items that are dicts
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be {' or '.join(map(str, allowed))}, got {getattr(self, name)}")
        self.use_cache = True  # is saved in checkpoints, which generate; compute_loss turns it off
        self.remove_unused_columns = False  # the inputs are those of the model
        self.prediction_loss_only = True
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every process uses all: see Collator
        super().__post_init__()
        if self.sequence_parallel < 1 or self.world_size % self.sequence_parallel:
            raise ValueError(
                f"--sequence_parallel must divide the number of processes, {self.world_size}, "
                f"got {self.sequence_parallel}"
            )
        check_trackers(self.report_to)
        if self.n_gpu > 1:  # DataParallel would cut pixels, which have no batch dimension, anywhere
            raise ValueError(
                f"finetune.py sees {self.n_gpu} GPUs: start it with accelerate launch --config_file "
                "examples/accelerate/ddp.yaml (or fsdp2.yaml, ...), or set CUDA_VISIBLE_DEVICES=0"
            )


def trained_parts(arguments: ModelArguments) -> set[str]:
    """Those of PARTS that are trained."""
    chosen = () if arguments.method == "gates" else ("language",) if arguments.distill else PARTS[:-1]
    return {"gates", *(part for part in chosen if getattr(arguments, f"train_{part}"))}


def load_config(arguments: ModelArguments):
    """The model's configuration with the settings of the arguments."""
    if find_adapter(arguments.model) is not None:
        raise ValueError(f"--model {arguments.model} is an adapter; name a model, such as the merged one beside it")
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=True)
    check_repository(arguments.model, config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"--model {arguments.model} holds quantized weights; name the model that it was made of")
    for name, value in given_fields(arguments).items():
        setattr(config, name, value)
    if arguments.distill:
        check_distillation(arguments, config)
    if config.nsa_variant in ("merged", "dense") and trained_parts(arguments) == {"gates"}:
        raise ValueError(
            f"nothing would be trained: gates alone (--method gates) have no use in --nsa_variant {config.nsa_variant}"
        )
    return config


def check_distillation(arguments: ModelArguments, config) -> None:
    """Raise a ValueError if --distill does not go with the other arguments."""
    if arguments.method == "full":
        raise ValueError(
            "--distill needs --method gates or lora, got full: whole weights that are trained would not keep the dense "
            "attention that they learn from"
        )
    if config.nsa_variant != "paper":
        raise ValueError(f"--distill needs --nsa_variant paper, whose gates it trains, got {config.nsa_variant}")
    if arguments.train_vision:
        raise ValueError("--distill trains attention of the language model: leave out --train_vision")
    if arguments.method == "lora" and not arguments.train_language:
        raise ValueError("--distill --method lora adapts the language model: leave out --train_language false")
    if arguments.load_in_4bit:
        raise ValueError("--distill needs the dense attention of weights with all their bits: leave out --load_in_4bit")
    if arguments.start_samples < 0:
        raise ValueError(f"--start_samples must be 0 or more, got {arguments.start_samples}")


def load_model(arguments: ModelArguments, config, bf16: bool):
    """(model, dtype of its checkpoint), with the parts frozen, or wrapped in adapters, as asked for."""
    saved = config.dtype or torch.float32
    saved = getattr(torch, saved) if isinstance(saved, str) else saved
    mixed = arguments.dtype == "auto" and arguments.method != "full" and bf16
    dtype = saved if mixed else torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    compute = torch.bfloat16 if bf16 else dtype
    quantization = {"quantization_config": four_bits(compute)} if arguments.load_in_4bit else {}
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model,
        config=config,
        trust_remote_code=True,
        dtype=dtype,
        attn_implementation=arguments.attn_implementation,
        **quantization,
    )
    if arguments.load_in_4bit:
        make_trainable(model)
    trained = trained_parts(arguments)
    if arguments.method == "lora":
        model = add_adapters(model, arguments, trained)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in trained)
    if mixed and not is_deepspeed_zero3_enabled():  # see add_adapters
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, saved


def add_adapters(model, arguments: ModelArguments, trained: set[str]):
    """A PeftModel: adapters for the language model and the vision tower, whole weights for gates and merger."""
    from peft import LoraConfig, get_peft_model

    patterns = {"language": DISTILL_TARGETS} if arguments.distill else LORA_TARGETS
    targets = [pattern for part, pattern in patterns.items() if part in trained]
    if not targets:
        raise ValueError("--method lora needs --train_language or --train_vision; for the gates alone: --method gates")
    deepstack = getattr(model.config.vision_config, "deepstack_visual_indexes", ())  # of Qwen3-VL
    mergers = ["visual.merger", *(f"visual.deepstack_merger_list.{i}" for i in range(len(deepstack)))]
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="|".join(f"({pattern})" for pattern in targets),
        modules_to_save=["g_proj_1", "g_proj_2", *(mergers if "merger" in trained else [])],
    )
    # ZeRO-3 has copies in float32 itself, and wants one dtype.
    return get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())


def load_processor(model: str, arguments: DataArguments):
    """The model's processor with the sampling of the arguments, which is saved with the result."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    video = processor.video_processor
    if arguments.fps is not None:
        video.fps = arguments.fps
    if arguments.max_frames is not None:
        video.max_frames = arguments.max_frames
    if arguments.max_tokens is not None:
        video.max_tokens = arguments.max_tokens
    if arguments.max_pixels is not None:
        video.size = {"shortest_edge": video.size["shortest_edge"], "longest_edge": arguments.max_pixels}
    return processor


def load_data(
    arguments: DataArguments, processor, seed: int, distill: bool
) -> dict[str, tuple[list[Sample], list[Drop]]]:
    """Checked samples and drops of "train" and "eval"."""
    files = {"train": arguments.train_data, "eval": arguments.eval_data or []}
    roots = arguments.media_root or []
    if len(roots) not in (0, 1, len(files["train"]) + len(files["eval"])):
        raise ValueError(f"--media_root must name one folder, or one for each data file, got {len(roots)}")
    if arguments.clip_frames is not None and len(arguments.clip_frames) != 2:
        raise ValueError(f"--clip_frames must be two numbers, got {arguments.clip_frames}")
    if not 0 <= arguments.max_dropped <= 1:
        raise ValueError(f"--max_dropped must be from 0 to 1, got {arguments.max_dropped}")
    loaded = {}
    for split, specs in files.items():
        own = roots if len(roots) < 2 else roots[: len(specs)] if split == "train" else roots[-len(specs) :]
        loaded[split] = load_samples(
            specs,
            processor,
            split=split,
            roots=own if specs else (),
            max_length=arguments.max_length,
            frames=None if arguments.clip_frames is None else tuple(arguments.clip_frames),
            max_dropped=arguments.max_dropped,
            seed=seed,
            threads=arguments.check_threads,
            require_answer=not distill,
            require_media=distill,
        )
    return loaded


def on_main_process(args: TrainingArguments, function, *arguments):
    """What a function returns, on every process, though only the first calls it; an error is raised on all."""
    result = [None, None]
    if args.process_index == 0:
        try:
            result[0] = function(*arguments)
        except (OSError, ValueError) as error:
            result[1] = error
    if args.world_size > 1:
        result = broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def report_data(loaded, output: Path | None) -> None:
    """Print how much of the data is used, what is dropped and why, and keep the whole list as dropped.jsonl."""
    for split, (samples, drops) in loaded.items():
        if not samples and not drops:
            continue
        print(f"{split}: {len(samples):,} samples, {len(drops):,} dropped")
        if samples:
            tokens = sorted(sample.tokens for sample in samples)
            vision = sum(sample.vision_tokens for sample in samples) / sum(tokens)
            print(
                f"  tokens per sample: {tokens[0]:,} least, {statistics.median(tokens):,.0f} median, "
                f"{sum(tokens) / len(tokens):,.0f} mean, {tokens[-1]:,} most; "
                f"{sum(tokens):,} in all, {vision:.1%} of them vision"
            )
        for drop in drops[:10]:
            print(f"  dropped {drop.id}: {drop.reason}")
        if len(drops) > 10:
            kinds = Counter(drop.reason.split(":")[0] for drop in drops)
            print("  ... in all: " + "; ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common(10)))
    if output:
        lines = [
            json.dumps({"split": split, "id": drop.id, "reason": drop.reason}) + "\n"
            for split, (_, drops) in loaded.items()
            for drop in drops
        ]
        (output / "dropped.jsonl").write_text("".join(lines))


def run_options(model: ModelArguments, config, args: FinetuneArguments) -> dict:
    """The options that make another run, or that Trainer would take from the checkpoint without a word."""
    lora = ("lora_rank", "lora_alpha", "lora_dropout", "load_in_4bit") if model.method == "lora" else ()
    names = ("method", "distill", "dtype", *lora)
    rates = [f"{part}learning_rate" for part in ("", "gate_", "merger_", "vision_")]
    return {
        **{name: getattr(model, name) for name in names},
        "parts": sorted(trained_parts(model)),
        **{name: getattr(config, name) for name in NSA_FIELDS if name != "nsa_backend"},
        **{name: getattr(args, name) for name in (*rates, "weight_decay", "optim")},
    }


def describe(arguments: ModelArguments, trainer: VideoTrainer, amount: str) -> str:
    """What a model card says of the training."""
    if not arguments.distill:
        method = f"{arguments.method}{', over 4 bits' if arguments.load_in_4bit else ''}"
        return f"Fine-tuned from the above by `examples/finetune.py` ({method}): {amount}."
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    note = (
        "Its gates learned from the dense attention of the above, layer by layer and without answers, by "
        f"`examples/finetune.py --distill` ({arguments.method}): {amount}."
    )
    if arguments.method == "lora":
        note += " Adapters of the queries, keys and values learned with them, and are merged into the weights."
    else:
        note += ' With `nsa_variant="dense"`, the model computes what the above does.'
    if losses:
        what = "errors of vision and of text, added up," if arguments.method == "lora" else "error"
        note += f" Relative squared {what} of the sparse attention at the end: {losses[-1]:.3f}."
    return note


def publish(trainer: VideoTrainer, arguments: ModelArguments, saved: torch.dtype, note: str) -> None:
    """Write the trained model, in the dtype of its source, to the output folder so that it loads as it is."""
    folder, lora = Path(trainer.args.output_dir), arguments.method == "lora"
    model = trainer.accelerator.unwrap_model(trainer.model)
    with unsharded_class(model):
        base = model.get_base_model() if lora else model
        model_class, config = type(base), base.config
    trained = folder / ("adapter" if lora else ".trained")
    trainer.save_model(str(trained), _internal_call=True)
    if trainer.args.should_save:
        (trained / "training_args.bin").unlink(missing_ok=True)  # a pickle
        if trainer.is_deepspeed_enabled:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # else from_pretrained would wait for the other processes
        # Read again from disk: sharded weights cannot be cast or merged where they are.
        source = arguments.model if lora else trained
        final = model_class.from_pretrained(source, config=config, dtype=saved)
        if lora:
            from peft import PeftModel

            final = PeftModel.from_pretrained(final, trained).merge_and_unload().to(saved)
        final.save_pretrained(folder)
        # It leaves out what the model does not import.
        copy_code(folder, source=arguments.model)
        share(folder)
        if not lora:
            shutil.rmtree(trained)
        trainer.processing_class.save_pretrained(folder)
        name = trainer.hub_model_id or folder.resolve().name
        write_card(arguments.model, folder, final.config, base=arguments.model, name=name, note=note)
        if lora:
            write_adapter_card(trained, base=arguments.model, name=name, note=note, **given_fields(arguments))
        if (licence := Path(arguments.model) / "LICENSE").is_file():
            shutil.copyfile(licence, folder / "LICENSE")
    trainer.accelerator.wait_for_everyone()


class FinetuneParser(Underscores, HfArgumentParser):
    """A parser whose help lists the options of `TOPICS` first."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(USAGE)
        formatter.add_text(self.description)

        listed = {name for names in TOPICS.values() for name in names}
        others = dict.fromkeys(action.dest for action in self._actions if action.dest not in listed)
        for topic, names in {**TOPICS, TRAINER_TOPIC: others}.items():
            formatter.start_section(topic)
            for name in names:
                formatter.add_arguments(action for action in self._actions if action.dest == name)
            formatter.end_section()
        return formatter.format_help()


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, FinetuneArguments]:
    """The three groups of options, of `--config FILE` and of the command line, which goes before it."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path, help="YAML or JSON file of options")
    parser = FinetuneParser(
        (ModelArguments, DataArguments, FinetuneArguments),
        description=__doc__,
        parents=[first],
        formatter_class=HelpFormatter,
    )
    named, rest = first.parse_known_args(argv)
    options = []
    if path := named.config:
        if not path.is_file():
            raise ValueError(f"--config must be a file, got {path}")
        given = yaml.safe_load(path.read_text())
        if not isinstance(given, dict):
            raise ValueError(f"--config {path} must hold names and values of options")
        for name, value in given.items():
            if value is None:
                continue
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            options += [f"--{name}", *map(str, values)]
    model, data, args, _ = parser.parse_args_into_dataclasses([*options, *rest], look_for_args_file=False)
    return model, data, args


def finetune(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments) -> VideoTrainer:
    """Train as the arguments say and return the trainer.

    Raises:
        ValueError, FileNotFoundError: an argument or a data file is wrong, or no sample can be used.
    """
    set_seed(args.seed)
    model_args.model = check_source("--model", model_args.model)
    if model_args.load_in_4bit:
        check_four_bits(model_args.method, args)
    output = Path(args.output_dir)
    if output.is_dir() and output.resolve() == Path(model_args.model).resolve():
        raise ValueError(f"--output_dir must not be --model, which it would overwrite, got {output}")
    if model_args.distill and args.sequence_parallel > 1:
        raise ValueError(f"--distill needs --sequence_parallel 1, got {args.sequence_parallel}")
    resume = None if args.dry_run else on_main_process(args, find_resume, args)
    with naming(model_args.model):
        config = load_config(model_args)
        processor = load_processor(model_args.model, data_args)
    samples, held_out = open_data(data_args, args, processor, model_args.distill)

    with naming(model_args.model):
        model, saved = load_model(model_args, config, args.bf16)
    skipped = None if args.dry_run else output / "skipped.jsonl"
    train, evaluated = make_datasets(samples, held_out, processor, data_args, args, skipped)
    if args.process_index == 0:
        report_training(model, samples, train, data_args)
        if skipped and not resume:
            skipped.unlink(missing_ok=True)

    batches = args.gradient_accumulation_steps * args.world_size // args.sequence_parallel
    per_step = args.per_device_train_batch_size * batches
    if args.dry_run:
        set_dry_run(args)
    else:
        described = describe_data(
            samples, packing=data_args.packing, max_length=data_args.max_length, seed=data_seed(args), batch=per_step
        )
        on_main_process(args, check_options, run_options(model_args, config, args), described, args, resume)
    always_vision = args.world_size > 1 and not model_args.distill  # its data always has some
    trainer = (DistillTrainer if model_args.distill else VideoTrainer)(
        model=model,
        args=args,
        train_dataset=choose_items(train, per_step, args.seed) if args.dry_run else train,
        eval_dataset=evaluated,
        processing_class=processor,
        data_collator=Collator(processor, packed=data_args.packing, always_vision=always_vision),
    )
    # DeepSpeed and FSDP load strictly themselves.
    if resume and not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        on_main_process(args, check_weights, model, Path(resume))
    if args.dry_run:
        dry_run(trainer, train.lengths(), per_step, math.ceil(len(train) / per_step))
        return trainer
    trainer.tracking = Tracking(trainer, {"model": asdict(model_args), "data": asdict(data_args)}, resume)
    if not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        trainer.questions = choose_questions(held_out, args.eval_answers)
    count = min(model_args.start_samples, len(train))
    if model_args.distill and count and not resume:
        trainer.start_gates([train[i * len(train) // count] for i in range(count)])
    result = train_to_the_end(trainer, resume)

    note = describe(model_args, trainer, f"{len(samples):,} samples, {result.global_step:,} steps of {per_step}")
    publish(trainer, model_args, saved, note)
    if args.process_index == 0:
        report_output(output, skipped)
        if args.push_to_hub:
            push(output, trainer.hub_model_id, args.hub_revision, args.hub_token)
    return trainer


def train_to_the_end(trainer: VideoTrainer, resume: str | None):
    """What the Trainer returns.

    Raises:
        Interrupted: the process was asked to stop, and the training has saved a checkpoint.
    """
    interruption = Interruption()
    trainer.add_callback(interruption)
    with interruption:
        result = trainer.train(resume_from_checkpoint=resume)
    if interruption.stopped:
        name, step = signal.Signals(interruption.signum).name, trainer.state.global_step
        saved = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        raise Interrupted(
            f"stopped by {name} after step {step:,} of {trainer.state.max_steps:,}; saved {saved}. "
            f"Resume with: {resume_command(trainer.args.world_size)}",
            interruption.signum,
        )
    if interruption.signum is not None:  # after the last step
        raise KeyboardInterrupt
    return result


def data_seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def open_data(
    data_args: DataArguments, args: FinetuneArguments, processor, distill: bool
) -> tuple[list[Sample], list[Sample]]:
    """The samples to train on and those for evaluation; reports what is dropped."""
    loaded = on_main_process(args, load_data, data_args, processor, data_seed(args), distill)
    if args.process_index == 0:
        output = None if args.dry_run else Path(args.output_dir)
        if output:
            output.mkdir(parents=True, exist_ok=True)
        report_data(loaded, output)

    samples, held_out = loaded["train"][0], loaded["eval"][0]
    if not samples:
        raise ValueError("--train_data: no sample can be used")
    if not held_out and args.eval_strategy != "no":
        raise ValueError(f"--eval_strategy {args.eval_strategy} needs --eval_data with samples that can be used")
    return samples, held_out


def make_datasets(
    samples: list[Sample],
    held_out: list[Sample],
    processor,
    data_args: DataArguments,
    args: FinetuneArguments,
    skipped: Path | None,
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """The data sets of training and of evaluation."""
    options = {
        "max_length": data_args.max_length,
        "capacity": data_args.max_length if data_args.packing else None,
        "dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "skipped": skipped,
    }
    train = ConversationDataset(samples, processor, **options)
    if not held_out:
        return train, None
    multiple = args.world_size * args.per_device_eval_batch_size
    return train, ConversationDataset(held_out, processor, multiple=multiple, **options)


def report_training(model, samples: list[Sample], train: ConversationDataset, data_args: DataArguments) -> None:
    """Print how samples are packed, and how many weights of each part are trained."""
    if data_args.packing:
        print(f"packing: {len(samples):,} samples in {len(train):,} sequences of up to {data_args.max_length:,}")
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += (parameter.numel() or getattr(parameter, "ds_numel", 0)) * parameter.requires_grad
    print("trained: " + ", ".join(f"{part} {count / 1e6:,.2f} M" for part, count in counts.items() if count))


def report_output(output: Path, skipped: Path) -> None:
    print(f"wrote {output}")
    if skipped.exists():
        count = len({json.loads(line)["id"] for line in skipped.read_text().splitlines()})
        print(f"{count:,} samples could not be read and were skipped: see {skipped}")


def push(folder: Path, repo_id: str, revision: str | None, token: str | None) -> None:
    """Upload the output folder without checkpoints, to a branch that exists."""
    ignored = ["checkpoint-*", "*/training_args.bin", "training_args.bin", ".*", "*.jsonl", "data.json"]
    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Add the trained model",
            revision=revision,
            ignore_patterns=ignored,
        )
    except (OSError, httpx.HTTPError) as error:
        command = ["hf", "upload", repo_id, str(folder), ".", *(["--revision", revision] if revision else [])]
        command += [f"--exclude={pattern}" for pattern in ignored]
        message = f"--push_to_hub: the upload failed: {error}; resume it with: {shlex.join(command)}"
        raise ValueError(message) from error
    print(f"pushed to {repo_id}")


@door
def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    try:
        finetune(*parse_arguments(sys.argv[1:]))
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"finetune.py: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("finetune.py: interrupted; nothing was published", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        if torch.distributed.is_initialized():
            with contextlib.suppress(Exception):
                torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
