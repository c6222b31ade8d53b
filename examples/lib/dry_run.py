"""The dry run of `finetune.py`: which samples it trains on, and what it says."""

import itertools
import random
import statistics
import tempfile

import torch
from torch.utils.data import Subset
from transformers import TrainingArguments

from .data import ConversationDataset
from .training import VideoTrainer, peak_memory

# The first and the last step take the longest samples: the first fails at once if memory is too small for them, the
# last has the states of the optimizer in memory, too. The steps between them are measured.
STEPS = 5


def set_dry_run(args: TrainingArguments) -> None:
    """Have the Trainer make a few steps, of samples in their order, and write nothing."""
    args.max_steps = STEPS
    args.logging_steps = 1
    args.report_to = []
    args.push_to_hub = False
    args.save_strategy = args.eval_strategy = "no"
    args.train_sampling_strategy = "sequential"
    args.output_dir = tempfile.gettempdir()  # Trainer makes the folder


def choose_items(dataset: ConversationDataset, per_step: int, seed: int) -> Subset:
    """The items of the steps, `per_step` for each."""
    lengths = dataset.lengths()
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shuffled = random.Random(seed).sample(range(len(lengths)), len(lengths))
    first = list(itertools.islice(itertools.cycle(longest), per_step))
    others = list(itertools.islice(itertools.cycle(shuffled), per_step * (STEPS - 2)))
    return Subset(dataset, [*first, *others, *first])


def dry_run(trainer: VideoTrainer, lengths: list[int], per_step: int, steps_per_epoch: int) -> None:
    """Train the steps and print what they took.

    Args:
        lengths: tokens of the items of the whole data set.

    Raises:
        ValueError: memory is too small.
    """
    longest = max(lengths)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--dry_run: out of memory on samples or packs of up to {longest:,} tokens, {per_step:,} in a step; lower "
            "--max_length, --max_frames, --max_pixels or --per_device_train_batch_size, or use "
            f"--gradient_checkpointing or --method lora ({str(error).splitlines()[0]})"
        ) from error
    if trainer.args.process_index > 0:
        return
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    steps = trainer.meter.step_seconds[1:-1]
    seconds = statistics.median(steps)
    owner = "GPU" if trainer.args.device.type == "cuda" else "process"
    print(f"loss of the first steps: {', '.join(f'{loss:.4f}' for loss in losses)}")
    print(
        f"memory of the {owner}: {peak_memory(trainer.args.device) / 2**30:.2f} GiB at most, in steps with the longest "
        f"samples or packs (up to {longest:,} tokens)"
    )
    print(
        f"time per epoch: {steps_per_epoch:,} steps × {duration(seconds)} = {duration(seconds * steps_per_epoch)} "
        f"({len(steps)} steps measured, decoding included)"
    )


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"
