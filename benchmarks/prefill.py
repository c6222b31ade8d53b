"""Time to first token, memory and decoding speed of a whole model: VideoNSA against stock Qwen2.5-VL.

    python benchmarks/prefill.py                            # 8K ... 128K vision tokens, the language model of the 7B
    python benchmarks/prefill.py --lengths 64K --attention flash_attention_3
    python benchmarks/prefill.py --lengths 128K --nsa_variant merged  # what stock weights run untrained

    # on a CPU
    python benchmarks/prefill.py --dtype fp32 --layers 4 --hidden 896 --heads 14 --kv_heads 2 --lengths 8K
    python benchmarks/prefill.py --dtype fp32 --checkpoint examples/tiny --lengths 14720

Both models have the same random weights, made on the device; no checkpoint is needed. The prompt is a video of 64
tokens per two frames between a little text, given as embeddings: decoding, processor and vision tower are left out.
On a CPU, times of the prefill are those of the processor, and both models run turn and turn about.
"""

import functools
import statistics
import time
from pathlib import Path

import torch
from common import (
    DTYPES,
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
    measure_on_cpu,
    parse_model_options,
    report_models,
)
from transformers.utils import logging

from videonsa.transformers_compat import CACHE, cache_of


@door
def main() -> None:
    parser = OptionParser(__doc__)
    parser.add_argument("--layers", type=int, default=28, help="(%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=32, help="decoding steps, 0 for none (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="a folder: its sparse against its dense variant")
    parser.add_argument("--runs", type=int, default=5, help="at least so many of each model (%(default)s)")
    add_model_options(parser, lengths=[2**i for i in range(13, 18)])
    add_options(parser)
    args = parse_model_options(parser)
    device = torch.device(args.device)
    logging.set_verbosity_error()
    models = load_models(args, device) if args.checkpoint else make_models(args, device, args.layers)
    kernels = dict(zip(models, (args.nsa_backend, args.attention), strict=True))
    same = {
        "benchmark": "prefill",
        **environment(device, args.date),
        "dtype": args.dtype,
        "nsa_variant": args.nsa_variant,
    }
    same |= shape_of(models["VideoNSA"])
    if device.type == "cpu":
        same["threads"] = torch.get_num_threads()
    if args.checkpoint:
        same["checkpoint"] = args.checkpoint.name
    same["weights_mb"] = round(sum(p.numel() * p.element_size() for p in models["VideoNSA"].parameters()) / 1e6)
    announce(same)
    for tokens in args.lengths:
        prompt = make_prompt(models["VideoNSA"], tokens, args.question)
        calls = {name: functools.partial(first_token, model, prompt) for name, model in models.items()}
        on_cpu = measure_on_cpu(calls, args.runs) if device.type == "cpu" else {}

        results, rows = Results(args.output / "prefill.json", same), []
        for name, model in models.items():
            row = {"model": name, "kernel": kernels[name], "tokens": tokens, "text_tokens": TEXT_BEFORE + args.question}
            row |= on_cpu.get(name) or measure(calls[name], device, args.seconds, least=args.runs)
            if "ms" in row and args.new_tokens > 0:
                row["decode_tokens_per_s"] = decoding_speed(model, prompt, args.new_tokens)
            rows.append(row)
            results.write(rows)
        columns = ("tokens", "model", "kernel", "ms", "ms_low", "ms_high", "peak_mb", "decode_tokens_per_s")
        report_models(results, columns, rows)


def load_models(args, device: torch.device) -> dict:
    """A checkpoint with sparse and with dense attention."""
    from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

    options = {"nsa_backend": args.nsa_backend, "dtype": DTYPES[args.dtype]}
    models = {}
    for name, variant, attention in (("VideoNSA", args.nsa_variant, "sdpa"), ("dense", "dense", args.attention)):
        settings = {"nsa_variant": variant, "attn_implementation": attention, **options}
        models[name] = VideoNSAForConditionalGeneration.from_pretrained(args.checkpoint, **settings).to(device).eval()
    return models


def shape_of(model) -> dict:
    config = model.config.text_config
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
    }


@torch.no_grad()
def first_token(model, prompt: dict):
    """The cache after the prompt; returns when the first token is on the host."""
    outputs = model(**prompt, use_cache=True, logits_to_keep=1)
    outputs.logits[0, -1].argmax().item()
    return cache_of(outputs)


@torch.no_grad()
def decoding_speed(model, prompt: dict, new_tokens: int) -> float:
    """Tokens per second after the prompt: greedy steps, each with its token on the host as in generate(); median."""
    cache = first_token(model, prompt)
    position = prompt["position_ids"].max() + 1
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)  # any: random weights might choose a placeholder
    times = []
    for step in range(new_tokens + 2):  # two to warm up
        start = time.perf_counter()
        positions = (position + step).expand(3, 1, 1)
        outputs = model(input_ids=token, position_ids=positions, **{CACHE: cache}, use_cache=True)
        outputs.logits[0, -1].argmax().item()
        times.append(time.perf_counter() - start)
    return round(1 / statistics.median(times[2:]), 2)


if __name__ == "__main__":
    main()
