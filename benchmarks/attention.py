"""Time of one attention layer: the branches of Native Sparse Attention, all of it, and dense attention.

    python benchmarks/attention.py                          # 4K ... 256K tokens in the shape of the 7B, forward
    python benchmarks/attention.py --backward               # also backward, and forward and backward together
    python benchmarks/attention.py --lengths 64K 128K --overlaps 0.8 0.9
    python benchmarks/attention.py --lengths 64K --interleave        # whole and dense again in turns, cold and warm L2
    python benchmarks/attention.py --lengths 64K --variants          # also the attention of `released` and `merged`

What users call is what is measured: the functions of `nsa_triton.py` (on a GPU) and `nsa_torch.py` (on a CPU, and up
to 8K tokens on a GPU), against every dense kernel there is, in the same run. README.md says what a figure includes.
"""

import argparse
import functools
import importlib.util
import itertools
import warnings

import torch
from common import (
    DTYPES,
    add_options,
    announce,
    append_rows,
    door,
    environment,
    measure,
    measure_in_turns,
    parse_length,
    print_table,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from videonsa import nsa_merged, nsa_released, nsa_torch, nsa_triton

PASSES = ("forward", "backward", "forward+backward")
SDPA_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
FLASH_PACKAGES = {"FlashAttention-2": "flash_attn", "FlashAttention-3": "flash_attn_interface"}
SMALL = 8192  # tokens up to which kernels run that are slow, or hold all scores: nsa_torch and SDPA's MATH
TILE = 16  # adjacent queries whose blocks are united: nearly those of a tile of nsa_triton (18, of 7 heads per KV head)


@door
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=parse_length, nargs="+", help="tokens (4K ... 256K; --backward: also 36K)")
    parser.add_argument("--backward", action="store_true", help="measure backward and forward+backward, too")
    parser.add_argument("--interleave", action="store_true", help="measure whole and dense in turns, too")
    parser.add_argument("--variants", action="store_true", help="measure the other variants, too")
    parser.add_argument("--overlaps", type=float, nargs="*", default=[0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.96],
                        help="of the blocks of neighbouring queries, besides random queries (%(default)s)")  # fmt: skip
    for name, default in (
        ("heads", 28), ("kv-heads", 4), ("head-dim", 128), ("block-size", 64), ("block-count", 32), ("window-size", 256)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    add_options(parser)
    args = parser.parse_args()
    args.passes = PASSES if args.backward else PASSES[:1]
    if args.lengths is None:
        args.lengths = sorted([2**i for i in range(12, 19)] + [36864] * args.backward)
    device = torch.device(args.device)
    shape = ("dtype", "heads", "kv_heads", "head_dim", "block_size", "block_count", "window_size")
    same = {"benchmark": "attention", **environment(device, args.date), **{name: getattr(args, name) for name in shape}}
    announce(same)
    for tokens in args.lengths:
        rows = measure_length(tokens, device, args)
        for name in args.passes:
            timed = [row for row in rows if row["pass"] == name and "ms" in row]
            for l2 in {row.get("l2") for row in timed}:
                alike = [row for row in timed if row.get("l2") == l2]
                dense_ms = min((row["ms"] for row in alike if row["part"] == "dense"), default=None)
                if dense_ms is not None:
                    for row in alike:
                        row["speedup"] = round(dense_ms / row["ms"], 3)  # over the fastest dense kernel of this run
            print(f"\n{tokens:,} tokens, {name}")
            columns = ("part", "kernel", "selection", "overlap", "union", "ms", "ms_low", "ms_high", "peak_mb")
            columns = (*columns, "l2") if args.interleave else columns
            print_table((*columns, "speedup"), timed)
        for row in rows:
            if "skipped" in row:
                print(f"skipped: {row['part']} {row['kernel']}, {row['pass']}: {row['skipped']}")
        append_rows(args.output / "attention.json", [{**same, "tokens": tokens, **row} for row in rows])


@torch.no_grad()
def measure_length(tokens: int, device: torch.device, args: argparse.Namespace) -> list[dict]:
    """Rows for all dense kernels, branches, selections and passes at one length."""
    torch.manual_seed(0)
    new = functools.partial(torch.randn, dtype=DTYPES[args.dtype], device=device)
    token = new(tokens, args.heads, args.head_dim)
    frame = new(-(-tokens // args.block_size), args.heads, args.head_dim)
    k, v = (new(tokens, args.kv_heads, args.head_dim) for _ in range(2))
    gates = new(tokens, args.heads, 3).sigmoid()
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    timed = functools.partial(measure, device=device, seconds=args.seconds)

    def queries(noise: float) -> torch.Tensor:
        """What the queries of a block have in common, and what each has of its own: noise 1 is random."""
        common = frame.repeat_interleave(args.block_size, 0)[:tokens]
        return common.mul_((1 - noise**2) ** 0.5).add_(token, alpha=noise)

    def choose(module, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, lse = module.compressed_attention(q, k, v, cu_seqlens, block_size=args.block_size)
        blocking = {"block_size": args.block_size, "block_count": args.block_count}
        return lse, module.select_blocks(q, k, lse, cu_seqlens, **blocking)

    def time_branches(module, q, lse, blocks, parts, selection) -> list[dict]:
        calls = branch_calls(module, q, k, v, gates, lse, blocks, cu_seqlens, args)
        rows = []
        for part in parts:
            row = {"part": part, "kernel": module.__name__.split("_")[-1]}
            row |= {} if part in ("compressed", "window") else selection
            call, tensors = calls[part]
            for name in args.passes if tensors else args.passes[:1]:
                rows.append({**row, "pass": name, **time_pass(name, call, tensors, timed)})
        return rows

    rows = dense_rows(queries(1.0), k, v, args.passes, timed)
    modules = [nsa_triton] if device.type == "cuda" else []
    if not modules or tokens <= SMALL:
        modules.append(nsa_torch)
    for module in modules:
        q = queries(1.0)
        lse, blocks = choose(module, q)
        random = {"selection": "random", **statistics_of(blocks)}
        parts = ("compressed", "select", "selected", "window", "whole")
        rows += time_branches(module, q, lse, blocks, parts, random)

    module = modules[0]
    if args.variants:
        for part, call in variant_calls(module, queries(1.0), k, v, gates, args).items():
            row = {"part": part, "kernel": module.__name__.split("_")[-1], "selection": "random", "pass": "forward"}
            rows.append({**row, **timed(call)})
    if args.interleave:
        q = queries(1.0)
        rows += interleaved_rows(module, q, k, v, gates, cu_seqlens, random, rows, args, device)
    for target in args.overlaps:
        if random["overlap"] is None or target <= random["overlap"]:
            continue  # there is no choice, or random selections overlap more than that
        q = queries(noise_for(target, lambda noise: statistics_of(choose(module, queries(noise))[1])["overlap"]))
        lse, blocks = choose(module, q)
        correlated = {"selection": f"overlap {target}", **statistics_of(blocks)}
        rows += time_branches(module, q, lse, blocks, ("selected", "whole"), correlated)
        if args.interleave:
            rows += interleaved_rows(module, q, k, v, gates, cu_seqlens, correlated, rows, args, device)
    return rows


def branch_calls(module, q, k, v, gates, lse, blocks, cu_seqlens, sizes) -> dict[str, tuple]:
    """For each part (call, tensors): call(*tensors) computes it, and the tensors have gradients; `sizes` has the sizes
    of `nsa_attention`."""
    block_size = {"block_size": sizes.block_size}
    blocking, window = {**block_size, "block_count": sizes.block_count}, {"window_size": sizes.window_size}
    return {
        "compressed": (lambda q, k, v: module.compressed_attention(q, k, v, cu_seqlens, **block_size)[0], (q, k, v)),
        "select": (lambda: module.select_blocks(q, k, lse, cu_seqlens, **blocking), ()),
        "selected": (
            lambda q, k, v: module.selected_attention(q, k, v, blocks, cu_seqlens, **block_size)[0],
            (q, k, v),
        ),
        "window": (lambda q, k, v: module.window_attention(q, k, v, cu_seqlens, **window)[0], (q, k, v)),
        "whole": (
            lambda q, k, v, gates: module.nsa_attention(q, k, v, gates, cu_seqlens, **blocking, **window),
            (q, k, v, gates),
        ),
    }


def variant_calls(module, q, k, v, gates, sizes) -> dict:
    """Forward calls of the other variants, over the same vision tokens: `released` without text, `merged` after 64
    tokens of it."""
    blocking = {"block_size": sizes.block_size, "block_count": sizes.block_count}
    vision = torch.ones(len(q), dtype=torch.bool, device=q.device)
    stream = nsa_released.Stream.make(vision, len(q), **blocking)
    lengths = (torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (len(q), min(64, len(k))))
    seen = torch.full((len(q),), min(64, len(k)), dtype=torch.int32, device=q.device)
    text = k[:64], v[:64], seen, *lengths
    options = {**blocking, "window_size": sizes.window_size}
    is_triton = module is nsa_triton
    return {
        "released": lambda: nsa_released.released_attention(q, k, v, gates, stream, triton=is_triton, **options),
        "merged": lambda: nsa_merged.merged_attention(q, k, v, *text, **options, triton=module is nsa_triton),
    }


def interleaved_rows(module, q, k, v, gates, cu_seqlens, selection, rows, sizes, device) -> list[dict]:
    """The forward pass of the whole in turns with the dense kernels that have been measured, with a cold L2 cache and
    with a warm one."""
    blocking = {"block_size": sizes.block_size, "block_count": sizes.block_count, "window_size": sizes.window_size}
    calls = {
        ("whole", module.__name__.split("_")[-1]): lambda: module.nsa_attention(q, k, v, gates, cu_seqlens, **blocking)
    }
    possible = {row["kernel"] for row in rows if row["part"] == "dense" and "ms" in row}
    for name, ways in dense_calls(q, k, v).items():
        if name in possible:
            noted = {row.get("note") for row in rows if row["kernel"] == name}
            call, tensors = next((call, tensors) for note, call, tensors in ways if note in noted)
            calls["dense", name] = functools.partial(call, *tensors)
    found = []
    for l2 in ("cold", "warm"):
        times = measure_in_turns(calls, device, sizes.seconds, cold=l2 == "cold")
        for (part, kernel), figures in times.items():
            row = {"part": part, "kernel": kernel, "pass": "forward", "l2": l2, "order": "ABBA"}
            found.append({**row, **selection, **figures})
    return found


def time_pass(name: str, call, tensors: tuple, timed) -> dict:
    """Time of one of `PASSES` through call(*tensors), which returns o in the shape of the first of them, with gradients
    for all of them, which are not added to others."""
    if name == "forward":
        return timed(functools.partial(call, *tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    d_out = torch.randn_like(tensors[0])
    with torch.enable_grad():
        if name == "backward":
            graph = functools.cache(lambda: call(*leaves))  # made by the first call, before time and memory count
            return timed(lambda: torch.autograd.grad(graph(), leaves, d_out, retain_graph=True))
        return timed(lambda: torch.autograd.grad(call(*leaves), leaves, d_out))


def dense_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, passes: tuple[str, ...], timed) -> list[dict]:
    """Causal attention of all queries by each kernel alone; q [tokens, heads, dim], k and v [tokens, kv heads, dim].

    Backends of SDPA get KV heads as they are where they can (enable_gqa), else repeated beforehand: the note says so,
    and neither time nor memory counts that.
    """
    kernels = dense_calls(q, k, v)
    rows = []
    for (name, calls), which in itertools.product(kernels.items(), passes):
        for note, call, tensors in calls:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what about these tensors a backend cannot do
                    figures = {"note": note, **time_pass(which, call, tensors, timed)}
                break
            except (RuntimeError, ImportError) as error:
                figures = {"skipped": str(error).split("\n")[0]}
        rows.append({"part": "dense", "kernel": name, "pass": which, **figures})
    return rows


def dense_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, list[tuple]]:
    """For each dense kernel the ways to call it, the best first: note, call and its tensors."""
    repeated = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
    kernels = {}
    for name in SDPA_BACKENDS:
        if name != "MATH" or len(q) <= SMALL:
            call = functools.partial(_sdpa, getattr(SDPBackend, name))
            kernels[f"sdpa {name}"] = [
                (note, call, tuple(x.transpose(0, 1)[None] for x in tensors))
                for note, tensors in ((None, (q, k, v)), ("KV heads repeated beforehand", (q, *repeated)))
            ]
    for name, package in FLASH_PACKAGES.items():
        if q.is_cuda and importlib.util.find_spec(package):
            call = functools.partial(_flash_attention, package)
            kernels[name] = [(None, call, tuple(x[None] for x in (q, k, v)))]
    return kernels


def _sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])


def _flash_attention(package, q, k, v):
    out = importlib.import_module(package).flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # FlashAttention-3 may return the lse, too


def statistics_of(blocks: torch.Tensor) -> dict:
    """Of blocks [groups, tokens, count]: `union`, the mean number of different blocks that `TILE` adjacent queries
    chose, and `overlap`, the mean Jaccard overlap of a query's blocks with the next one's, both having had a choice
    (more blocks behind them than they may take); None if no query had one."""
    groups, tokens, count = blocks.shape
    tiles = torch.nn.functional.pad(blocks, (0, 0, 0, -tokens % TILE), value=-1).view(groups, -1, TILE * count)
    number = _different(blocks)
    union = _different(torch.cat([blocks[:, :-1], blocks[:, 1:]], -1))
    both = number[:, :-1] + number[:, 1:] - union
    choice = blocks[:, :-1].amax(-1) >= count  # the own block is the last one
    overlap = round((both / union)[choice].mean().item(), 4) if choice.any() else None
    return {"union": round(_different(tiles).float().mean().item(), 2), "overlap": overlap}


def _different(blocks: torch.Tensor) -> torch.Tensor:
    """How many different blocks there are along the last dimension, -1 not counted."""
    blocks = blocks.sort(-1).values
    return (blocks[..., :1] >= 0).sum(-1) + ((blocks[..., 1:] >= 0) & (blocks.diff(dim=-1) != 0)).sum(-1)


def noise_for(target: float, overlap) -> float:
    """The noise of the queries for which overlap(noise) is `target`, by bisection on its logarithm."""
    low, high = -10.0, 0.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(2**middle) > target else (low, middle)
    return 2 ** ((low + high) / 2)


if __name__ == "__main__":
    main()
