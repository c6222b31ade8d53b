"""Time and memory of one optimizer step of the decoder layers: VideoNSA against stock Qwen2.5-VL.

    python benchmarks/train_step.py                         # 8K ... 64K vision tokens, layers of the 7B
    python benchmarks/train_step.py --checkpointing         # recomputes activations, layer by layer; also 128K

Both models have the same random weights, made on the device, and the same prompt as in `prefill.py`. A step is the
forward pass through all layers, the backward pass from a given gradient of the last hidden state, and AdamW.
"""

import argparse
import bisect
import gc

import torch
from common import (
    TEXT_BEFORE,
    OptionParser,
    Results,
    add_model_options,
    add_options,
    announce,
    door,
    environment,
    make_models,
    make_prompt,
    measure,
    parse_model_options,
    report_models,
)
from transformers.utils import logging


@door
def main() -> None:
    parser = OptionParser(__doc__)
    lengths = [8192, 16384, 36864, 65536]
    parser.add_argument("--layers", type=int, help="(as many of 28 as fit for both models, found by trying)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of every layer")
    add_model_options(parser, lengths)
    add_options(parser)
    args = parse_model_options(parser)
    if args.checkpointing and args.lengths == lengths:
        args.lengths = [*lengths, 131072]
    device = torch.device(args.device)
    shape = ("dtype", "nsa_variant", "hidden", "heads", "kv_heads")
    about = {**environment(device, args.date), **{name: getattr(args, name) for name in shape}}
    same = {"benchmark": "train_step", **about, "activations": "recomputed" if args.checkpointing else "kept"}
    logging.set_verbosity_error()
    kernels = {"VideoNSA": args.nsa_backend, "Qwen2.5-VL": args.attention}
    announce(same)
    for tokens in args.lengths:
        layers = args.layers or layers_that_fit(tokens, args, device)
        size = {"tokens": tokens, "text_tokens": TEXT_BEFORE + args.question, "layers": layers}
        steps = time_steps(layers, tokens, args, device, seconds=args.seconds, least=5)
        rows = [{"model": name, "kernel": kernels[name], **size, **step} for name, step in steps.items()]
        columns = ("tokens", "layers", "model", "kernel", "ms", "ms_low", "ms_high", "ms_per_layer")
        columns = (*columns, "weights_mb", "optimizer_mb", "peak_mb")
        report_models(Results(args.output / "train_step.json", same), columns, rows)


def layers_that_fit(tokens: int, args: argparse.Namespace, device: torch.device, most: int = 28) -> int:
    """The largest number of layers whose steps go through for both models; 1 if none does."""

    def too_many(layers: int) -> bool:
        try:
            steps = time_steps(layers, tokens, args, device, seconds=0, least=1)
        except torch.OutOfMemoryError:  # for the models alone
            return True
        return any("skipped" in step for step in steps.values())

    return 1 + bisect.bisect_left(range(2, most + 1), True, key=too_many)


def time_steps(layers: int, tokens: int, args: argparse.Namespace, device: torch.device, **timing) -> dict[str, dict]:
    """Figures of a step of either model."""
    gc.collect()  # the models of the last call: modules refer to each other in circles
    models = make_models(args, device, layers, vocabulary=16)
    prompt = make_prompt(models["VideoNSA"], tokens, args.question)
    return {name: time_step(model.model, prompt, args, device, **timing) for name, model in models.items()}


def time_step(model, prompt: dict, args: argparse.Namespace, device: torch.device, **timing) -> dict:
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stack = model.language_model
    weights = [*stack.layers.parameters(), *stack.norm.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    gradient = torch.randn_like(prompt["inputs_embeds"])

    def step():
        model(**prompt, use_cache=False).last_hidden_state.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    figures = measure(step, device, **timing)
    optimizer.zero_grad()  # what is left where memory ran out
    if "ms" in figures:
        figures["ms_per_layer"] = round(figures["ms"] / len(stack.layers), 4)
    state = [x for states in optimizer.state.values() for x in states.values()]
    return {**figures, "weights_mb": megabytes(weights), "optimizer_mb": megabytes(state)}


def megabytes(tensors: list[torch.Tensor]) -> float:
    return round(sum(x.nbytes for x in tensors) / 1e6, 1)


if __name__ == "__main__":
    main()
