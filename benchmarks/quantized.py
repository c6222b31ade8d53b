"""A quantized or compiled model beside the same one in fp32, on a CPU: the error of its logits, its size, its time.

    python benchmarks/quantized.py                             # random weights
    python benchmarks/quantized.py --checkpoint examples/tiny  # and the answers of a trained model; no times

Vision tower, gates and head stay as they are, as docs/ecosystem.md advises. `error` is the root mean square of the
difference of all logits of a prompt over that of the logits in fp32; `same_top`, the share of positions whose most
likely token is the same. `weights_mb` counts the language model's layers without gates. Times are those of the
processor, all threads together, and all ways run turn and turn about: a prompt, then a decoding step in a static cache.
What a way is refused for stands under `skipped`.
"""

import argparse
import functools
import importlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    OptionParser,
    add_output_options,
    announce,
    append_rows,
    door,
    environment,
    make_models,
    make_prompt,
    parse_length,
    print_table,
    time_calls,
    version,
)
from transformers import AutoProcessor, BitsAndBytesConfig, StaticCache, TorchAoConfig
from transformers.utils import logging

from lib.answering import answer
from lib.loading import CLIP, UNSEEN, read
from lib.needles import make_sample
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.transformers_compat import CACHE

KEPT = [".*visual", "lm_head", ".*g_proj_1", ".*g_proj_2"]
STEPS = 64  # room in the cache for decoding steps
CLIPS = 5
SIZES = {"layers": 4, "hidden": 896, "heads": 14, "kv_heads": 2, "threads": 1, "rounds": 5}


def bitsandbytes(**options) -> dict:
    return {"quantization_config": BitsAndBytesConfig(**options, llm_int8_skip_modules=KEPT)}


def torchao(name: str, module: str = "quantization", **options) -> dict:
    config = getattr(importlib.import_module(f"torchao.{module}"), name)(**options, set_inductor_config=False)
    return {"quantization_config": TorchAoConfig(config, modules_to_not_convert=KEPT)}


# Options of from_pretrained, made when they are needed: a package may be missing.
WAYS: dict[str, Callable[[], dict]] = {
    "fp32": dict,
    "fp32, compiled": dict,
    "bf16": lambda: {"dtype": torch.bfloat16},
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda: torchao("Int4WeightOnlyConfig", group_size=32),
    "torchao int4, prototype": lambda: torchao(
        "PrototypeInt4WeightOnlyConfig", "prototype.quantization.int4", group_size=32
    ),
}


@door
def main() -> None:
    parser = OptionParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder of a model that knows the clips of the tiny one")
    parser.add_argument("--tokens", type=parse_length, default=1024, help="vision tokens of the prompt (1K)")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS][1:], default=[*WAYS][1:], help="(all)", metavar="WAY")
    add_output_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    same = {"benchmark": "quantized", **environment(torch.device("cpu"), args.date), "threads": args.threads}
    same |= {name: version(name) for name in ("bitsandbytes", "torchao")}
    same["model"] = args.checkpoint.name if args.checkpoint else f"{args.layers} layers of {args.hidden}"
    announce(same)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print_table(("way", "error", "same_top", "right", "weights_mb", "prompt_ms", "step_ms", "skipped"), rows)
    append_rows(args.output / "quantized.json", [same | row for row in rows])


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each way, fp32 first."""
    source = args.checkpoint or save_random_model(args, folder / "random")
    clips = [make_sample(folder / f"clip-{i}", CLIP, (1, UNSEEN, i)) for i in range(CLIPS)] if args.checkpoint else []
    rows, calls, expected, prompt = [], {}, None, None
    for way in ("fp32", *args.ways):
        row = {"way": way}
        rows.append(row)
        try:
            model = VideoNSAForConditionalGeneration.from_pretrained(source, **{"dtype": torch.float32, **WAYS[way]()})
            prompt = prompt or (first_question(source, clips[0]) if clips else make_prompt(model, args.tokens, 32))
            run = Run(model.eval(), prompt, compiled="compiled" in way)
            logits = run.prompt_logits()
            run.step()
        except (AssertionError, ImportError, RuntimeError, ValueError) as error:
            if way == "fp32":
                raise  # the others are compared with it
            row["skipped"] = (str(error) or type(error).__name__).strip().split("\n")[0]
            continue
        expected = logits if expected is None else expected
        row["error"] = ((logits - expected).square().mean() / expected.square().mean()).sqrt().item()
        row["same_top"] = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        row["weights_mb"] = language_bytes(model) / 1e6
        if clips:
            row["right"] = right_answers(model, source, clips)
        else:
            calls |= {(way, "prompt_ms"): run.prompt_logits, (way, "step_ms"): run.step}
    for (way, name), seconds in time_calls(calls, args.rounds).items():
        next(row for row in rows if row["way"] == way)[name] = 1e3 * statistics.median(seconds)
    return rows


class Run:
    """A model with a prompt, and decoding steps after it."""

    def __init__(self, model, prompt: dict, compiled: bool):
        self.model = model
        self.prompt = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in prompt.items()}
        self.length = next(iter(prompt.values())).shape[1]
        self.call = torch.compile(model) if compiled else model
        self.one_step = torch.compile(model, fullgraph=True) if compiled else model

    @torch.no_grad()
    def prompt_logits(self) -> torch.Tensor:
        """float32 [1, tokens, vocabulary]; decoding goes on from here."""
        config = self.model.config.text_config
        self.cache, self.past = StaticCache(config=config, max_cache_len=self.length + STEPS), self.length
        return self.call(**self.prompt, **{CACHE: self.cache}, use_cache=True).logits.float()

    @torch.no_grad()
    def step(self) -> None:
        """Decode token 0: random weights might choose one that stands for an image or a video."""
        self.one_step(
            input_ids=torch.zeros(1, 1, dtype=torch.long),
            position_ids=torch.full((3, 1, 1), self.past),
            attention_mask=torch.arange(self.length + STEPS)[None, None, None] <= self.past,
            **{CACHE: self.cache},
            use_cache=True,
        )
        self.past += 1


def save_random_model(args: argparse.Namespace, folder: Path) -> Path:
    args = argparse.Namespace(**vars(args), dtype="fp32", nsa_backend="torch", nsa_variant="paper", attention="sdpa")
    make_models(args, torch.device("cpu"), args.layers, vocabulary=1024)["VideoNSA"].save_pretrained(folder)
    return folder


@functools.cache
def load_processor(source: Path):
    return AutoProcessor.from_pretrained(source, trust_remote_code=True)


def first_question(source: Path, clip: dict) -> dict:
    """Model inputs of the first question about a clip."""
    return dict(read(load_processor(source), clip["video"], clip["questions"][0]["question"])[0])


def right_answers(model, source: Path, clips: list[dict]) -> str:
    """Such as "19 of 20"."""
    processor, right = load_processor(source), []
    for clip in clips:
        for asked in clip["questions"]:
            prompt, _ = read(processor, clip["video"], asked["question"])
            prompt = {**prompt, "input_ids": prompt["input_ids"][0]}
            right.append(answer(model, processor, [prompt], max_new_tokens=12)[0].strip() == asked["answer"])
    return f"{sum(right)} of {len(right)}"


def language_bytes(model) -> int:
    """Of the weights of all linear layers in the language model's layers, gates excepted, with their scales."""
    modules = model.model.language_model.layers.named_modules()
    linear = [module for name, module in modules if isinstance(module, torch.nn.Linear) and "g_proj" not in name]
    return sum(stored_bytes(module.weight) for module in linear)


def stored_bytes(x: torch.Tensor) -> int:
    if hasattr(x, "__tensor_flatten__"):  # of torchao
        return sum(stored_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    scales = (getattr(x, "SCB", None), getattr(getattr(x, "quant_state", None), "absmax", None))  # of bitsandbytes
    return x.nbytes + sum(scale.nbytes for scale in scales if scale is not None)


if __name__ == "__main__":
    main()
