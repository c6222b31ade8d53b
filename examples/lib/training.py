"""The Trainer of `finetune.py`: rates per part, packed samples, losses as means over tokens, answers, and logs."""

import contextlib
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import CONFIG_NAME

from .answering import Prompts, Question, answer, is_correct, list_questions
from .data import IGNORED, Drop, Sample, packed_positions
from .folders import share
from .observe import BRANCHES

PARTS = ("language", "merger", "vision", "gates")
# The most tokens of an answer at evaluation.
LONGEST_ANSWER = 128


class Meter(TrainerCallback):
    """Measures between two logs: tokens, the seconds of training (without evaluation and saving), and mean gates."""

    def __init__(self, layers: int, sharing: int = 1):
        self.layers = layers
        self.sharing = sharing  # processes that have the same batch
        self.step_seconds = []
        self.reset()

    def reset(self) -> None:
        self.tokens = self.seconds = 0.0
        # [layers, branches + 1]: sums over vision tokens of the gates of each branch, and the number of these.
        self.gates = 0.0

    def count(self, inputs) -> None:
        """Note a batch; the layers of the model then call `observe`, first layer first."""
        mask = inputs.get("attention_mask")
        self.tokens += (inputs["input_ids"].numel() if mask is None else mask.sum()) / self.sharing
        self.batch = []

    def observe(self, attention, q, k, v, gates: torch.Tensor, layout) -> torch.Tensor:
        """Note the gates [vision tokens, heads, branches] of a layer."""
        if attention.layer_idx == len(self.batch):  # gradient checkpointing computes layers a second time
            sums = gates.detach().float().mean(1).sum(0)
            self.batch.append(torch.cat([sums, sums.new_tensor([len(gates)])]))
            if len(self.batch) == self.layers:
                self.gates = self.gates + torch.stack(self.batch)
        return gates

    def on_train_begin(self, *args, **kwargs):
        self.mark = time.perf_counter()

    on_evaluate = on_save = on_train_begin

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.step_seconds.append(now - self.mark)
        self.seconds += now - self.mark
        self.mark = now

    def read(self, accelerator) -> dict[str, float]:
        """Tokens per second of all processes and the mean gates, since the last call."""
        gates = torch.as_tensor(self.gates, device=accelerator.device) + torch.zeros(
            self.layers, len(BRANCHES) + 1, device=accelerator.device
        )
        tokens = torch.as_tensor(self.tokens, dtype=torch.float64, device=accelerator.device)
        gates, tokens = accelerator.reduce(gates, "sum"), accelerator.reduce(tokens, "sum")
        logs = {"tokens_per_second": round(tokens.item() / max(self.seconds, 1e-9), 1)}
        if gates[:, -1].min() > 0:
            means = gates[:, :-1] / gates[:, -1:]  # [layers, branches]
            for branch, values in zip(BRANCHES, means.T.tolist(), strict=True):
                logs[f"gate_{branch}"] = sum(values) / len(values)
                logs |= {f"gate_{branch}/layer_{i:02}": value for i, value in enumerate(values)}
        self.reset()
        return logs


class VideoTrainer(Trainer):
    """Trainer with learning rates per part, packed samples, logits where there is a loss only, and a `Meter`.

    As many neighbouring processes as `args.sequence_parallel` says share the tokens of a batch.

    Attributes:
        questions: that are answered at each evaluation; none by default.
        tracking: a `Tracking` that shows the answers, or None.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.questions: list[Question] = []
        self.tracking = None
        self.rate_names = []
        check_parallelism(getattr(self.accelerator, "parallelism_config", None))
        sharing = self.args.sequence_parallel
        if sharing > 1:
            shape = (self.args.world_size // sharing, sharing)
            mesh = init_device_mesh(self.args.device.type, shape, mesh_dim_names=("data", "sequence"))
            next(m for m in self.model.modules() if hasattr(m, "shard_sequence")).shard_sequence(mesh["sequence"])
        # Qwen2.5-VL says it does not take `num_items_in_batch`, but it does: with it, every token of a step counts the
        # same, however it is split into batches and processes.
        self.model_accepts_loss_kwargs = True
        self.meter = Meter(self.model.config.text_config.num_hidden_layers, sharing)
        self.add_callback(self.meter)
        for callback in (ProgressCallback, PrinterCallback):
            if self.pop_callback(callback):
                self.add_callback(short_logs(callback))

    def _get_dataloader(self, *args, **kwargs):
        """The Trainer's, which gives processes that share tokens the same batches."""
        loader = super()._get_dataloader(*args, **kwargs)
        sharing = self.args.sequence_parallel
        if sharing > 1:
            # Of accelerate: it gives process i of n every n-th batch, from the i-th on. The last ones are filled up
            # with samples from the beginning, where there are several at a time.
            sampler = loader.batch_sampler
            sampler.num_processes = self.args.world_size // sharing
            sampler.process_index = self.args.process_index // sharing
            sampler.even_batches = sampler.num_processes > 1
        return loader

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's optimizer, its groups split by part."""
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        model = args[0] if args else kwargs.get("model") or self.model
        parts = {parameter: part_of(name) for name, parameter in model.named_parameters()}
        adapters = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
        groups = []
        for group in optimizer.param_groups:
            for part in PARTS:
                parameters = [p for p in group["params"] if parts[p] == part]
                rate = {
                    "gates": self.args.gate_learning_rate,
                    "merger": self.args.merger_learning_rate,
                    "vision": self.args.vision_learning_rate,
                }.get(part)
                if parameters:
                    groups.append({**group, "params": parameters, "lr": group["lr"] if rate is None else rate})
                    self.rate_names.append(f"lora_{part}" if parameters[0] in adapters else part)
        optimizer.param_groups[:] = groups
        return optimizer

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "lengths" in inputs:
            model = next(m for m in self.model.modules() if hasattr(m, "get_rope_index"))
            inputs["position_ids"] = packed_positions(inputs, model.get_rope_index)
            inputs = {name: x for name, x in inputs.items() if name not in ("lengths", "second_per_grid_ts")}
        return inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        # At 36K tokens the logits of a vocabulary of 152K would take 22 GB; few positions have a loss.
        shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        keep = (shifted != IGNORED).any(0).nonzero().squeeze(1)
        inputs = {**inputs, "logits_to_keep": keep, "shift_labels": shifted[:, keep], "use_cache": False}
        if model.training:
            self.meter.count(inputs)
            inputs["observe"] = self.meter.observe
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: Trainer would make one step more
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs = self._prepare_inputs(inputs)
        tokens = self.counted(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        loss = torch.where(tokens > 0, loss, 0.0)
        self.evaluated += torch.stack([loss.double() * tokens, tokens])
        return loss, None, None

    def counted(self, inputs) -> torch.Tensor:
        """The tokens of a batch that its loss is a mean over."""
        return (inputs["labels"][:, 1:] != IGNORED).sum()

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As in Trainer, but the loss is the mean over tokens, however they are split into batches."""
        self.evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum of losses, tokens
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.accelerator.reduce(self.evaluated, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        if self.questions:
            answers = self.answer_questions()
            correct = [answer["correct"] for answer in answers]
            output.metrics[f"{metric_key_prefix}_exact_match"] = sum(correct) / max(len(correct), 1)
            if self.tracking:
                self.tracking.show_answers(answers, self.state.global_step)
        return output

    def answer_questions(self) -> list[dict]:
        """{"question", "expected", "answered", "correct"} for each of the questions; processes share the work."""
        mine = self.questions[self.args.process_index :: self.args.world_size]
        prompts = Prompts([[question] for question in mine], self.processing_class)
        answers = []
        for i in range(len(prompts)):
            found = prompts[i]
            if isinstance(found, Drop):  # a file that cannot be read; the loss leaves it out, too
                continue
            ((question, prompt),) = found
            longest = len(self.processing_class.tokenizer(question.expected)["input_ids"]) + 8
            with torch.no_grad(), self.compute_loss_context_manager():
                (text,) = answer(self.model, self.processing_class, [prompt], min(longest, LONGEST_ANSWER))
            asked = [part["text"] for part in question.messages[-1]["content"] if part["type"] == "text"]
            correct = is_correct(text, question.expected)
            answers.append(
                {"question": " ".join(asked), "expected": question.expected, "answered": text, "correct": correct}
            )
        return gather_object(answers) if self.args.world_size > 1 else answers

    def _save(self, output_dir=None, *args, **kwargs):
        folder = Path(output_dir or self.args.output_dir)
        with unsharded_class(self.model):
            super()._save(output_dir, *args, **kwargs)
        share(folder)
        if (folder / "adapter_config.json").is_file():
            # peft keeps nothing of the configuration, and makes a card of empty sections.
            self.model.get_base_model().config.to_json_file(folder / CONFIG_NAME)
            (folder / "README.md").unlink(missing_ok=True)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            rates = zip(self.rate_names, self.lr_scheduler.get_last_lr(), strict=False)
            logs = {**logs, **self.meter.read(self.accelerator)}
            logs |= {f"learning_rate/{name}": rate for name, rate in rates}
            logs["memory_gib"] = round(peak_memory(self.args.device) / 2**30, 3)
        super().log(logs, *args, **kwargs)


def check_parallelism(config) -> None:
    """Raise a ValueError if accelerate's `ParallelismConfig`, or None, splits tokens."""
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, 1)
        if size > 1:
            raise ValueError(
                f"{name} of accelerate must be 1, got {size}: each process would attend to its own tokens only. "
                f"Use --sequence_parallel {size}"
            )


@contextlib.contextmanager
def unsharded_class(model):
    """Give a model its own class back to be saved: FSDP2 changes it, and its code would be saved as the model's."""
    sharded = type(model)
    model.__class__ = next(c for c in sharded.__mro__ if not issubclass(c, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


def short_logs(callback: type[TrainerCallback]) -> type[TrainerCallback]:
    """A callback that prints logs, without the gates of every layer."""

    class ShortLogs(callback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs = {name: value for name, value in (logs or {}).items() if "/" not in name}
            super().on_log(args, state, control, logs=logs, **kwargs)

    return ShortLogs


def choose_questions(samples: list[Sample], count: int) -> list[Question]:
    """One question of each of `count` samples, spread over all."""
    asked = [questions for questions in map(list_questions, samples) if questions]
    count = min(count, len(asked))
    chosen = [asked[i * len(asked) // count] for i in range(count)]
    return [questions[i % len(questions)] for i, questions in enumerate(chosen)]


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, or else of this process. 0 if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def part_of(name: str) -> str:
    """Which of PARTS a parameter belongs to."""
    if ".g_proj_" in name:
        return "gates"
    if "visual." in name:
        return "merger" if "merger" in name else "vision"  # Qwen3-VL has further ones, deepstack_merger_list
    return "language"
