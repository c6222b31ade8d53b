"""Time to first token, memory and decoding speed of a whole model: VideoNSA against stock Qwen2.5-VL.

    python benchmarks/prefill.py                            # 8K ... 128K vision tokens, the language model of the 7B
    python benchmarks/prefill.py --lengths 64K --attention flash_attention_3

Both models have the same random weights, made on the device; no checkpoint is needed. The prompt is a video of 64
tokens per two frames between a little text, given as embeddings: decoding, processor and vision tower are left out.
"""

import argparse
import functools
import statistics
import time

import torch
from common import DTYPES, add_options, append_rows, environment, measure, parse_length, print_table
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

FRAME_PAIR = (1, 16, 16)  # grid of patches of two frames of 224 x 224, which become 64 tokens
TEXT_BEFORE = 16  # tokens: the system prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [2**i for i in range(13, 18)]
    parser.add_argument("--lengths", type=parse_length, nargs="+", default=lengths, help="vision tokens (8K ... 128K)")
    parser.add_argument("--question", type=int, default=32, help="text tokens after the video (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoding steps (%(default)s)")
    parser.add_argument("--attention", default="sdpa", help="what the stock model runs (%(default)s)")
    backend = "triton" if torch.cuda.is_available() else "torch"
    parser.add_argument("--backend", default=backend, choices=("triton", "torch"), help="nsa_backend (%(default)s)")
    for name, default in (("layers", 28), ("hidden", 3584), ("heads", 28), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if any(tokens % 64 for tokens in args.lengths):
        parser.error("--lengths must be multiples of 64, the tokens of two frames")
    device = torch.device(args.device)
    shape = ("dtype", "layers", "hidden", "heads", "kv_heads")
    same = {"benchmark": "prefill", **environment(device, args.date), **{name: getattr(args, name) for name in shape}}
    logging.set_verbosity_error()
    models = make_models(args, device)
    kernels = {"VideoNSA": args.backend, "Qwen2.5-VL": args.attention}
    same["weights_mb"] = round(sum(p.numel() * p.element_size() for p in models["VideoNSA"].parameters()) / 1e6)
    print(", ".join(f"{name} {value}" for name, value in same.items() if value is not None))
    for tokens in args.lengths:
        prompt = make_prompt(models["VideoNSA"], tokens, args.question)
        rows = []
        for name, model in models.items():
            row = {"model": name, "kernel": kernels[name], "tokens": tokens, "text_tokens": TEXT_BEFORE + args.question}
            row |= measure(functools.partial(first_token, model, prompt), device, args.seconds, least=5)
            if "ms" in row:
                row["decode_tokens_per_s"] = decoding_speed(model, prompt, args.new_tokens)
            rows.append(row)
        if all("ms" in row for row in rows):
            rows[0]["speedup"] = round(rows[1]["ms"] / rows[0]["ms"], 3)  # of VideoNSA over stock
        print()
        columns = ("tokens", "model", "kernel", "ms", "ms_low", "ms_high", "peak_mb", "decode_tokens_per_s", "speedup")
        print_table((*columns, "skipped"), rows)
        append_rows(args.output / "prefill.json", [{**same, **row} for row in rows])


def make_models(args: argparse.Namespace, device: torch.device) -> dict:
    """VideoNSA and stock Qwen2.5-VL with the same weights, but for the gates that only the former has."""
    quarter = args.hidden // args.heads // 8
    settings = {
        "text_config": {
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 37 // 7,  # 18,944 for 3,584
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [quarter, quarter * 3 // 2, quarter * 4 - quarter - quarter * 3 // 2],
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    with device:
        model = VideoNSAForConditionalGeneration._from_config(
            VideoNSAConfig(**settings, nsa_backend=args.backend), dtype=DTYPES[args.dtype], attn_implementation="sdpa"
        )
        stock = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**settings), dtype=DTYPES[args.dtype], attn_implementation=args.attention
        )
    missing = stock.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    assert not missing, missing
    return {"VideoNSA": model.eval(), "Qwen2.5-VL": stock.eval()}


def make_prompt(model: VideoNSAForConditionalGeneration, tokens: int, question: int) -> dict:
    """Text, a video of `tokens` vision tokens, text: embeddings [1, length, hidden], positions [3, 1, length], types.

    The embeddings are random, so that tokens choose their blocks all but independently of their neighbours.
    """
    types = torch.zeros(1, TEXT_BEFORE + tokens + question, dtype=torch.int32, device=model.device)
    types[:, TEXT_BEFORE : TEXT_BEFORE + tokens] = 2
    pairs, height, width = FRAME_PAIR
    grid = torch.tensor([[pairs * tokens // 64, height, width]])
    positions, _ = model.model.get_rope_index(types, mm_token_type_ids=types, video_grid_thw=grid)
    hidden = model.config.text_config.hidden_size
    embeddings = torch.randn(*types.shape, hidden, dtype=model.dtype, device=model.device) * 0.02
    return {"inputs_embeds": embeddings, "position_ids": positions, "mm_token_type_ids": types}


@torch.no_grad()
def first_token(model, prompt: dict):
    """The cache after the prompt; returns when the first token is on the host."""
    outputs = model(**prompt, use_cache=True, logits_to_keep=1)
    outputs.logits[0, -1].argmax().item()
    return outputs.past_key_values


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
        outputs = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
        outputs.logits[0, -1].argmax().item()
        times.append(time.perf_counter() - start)
    return round(1 / statistics.median(times[2:]), 2)


if __name__ == "__main__":
    main()
