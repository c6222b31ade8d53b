"""Time of one attention layer: the branches of Native Sparse Attention, all of it, and dense attention.

    python benchmarks/attention.py                          # 4K ... 256K tokens in the shape of the 7B, forward
    python benchmarks/attention.py --backward               # also backward, and forward and backward together
    python benchmarks/attention.py --lengths 64K 128K --overlaps 0.8 0.9
    python benchmarks/attention.py --lengths 64K --interleave        # whole and dense again in turns, cold and warm L2
    python benchmarks/attention.py --backend my_kernels              # also those of another module, if they are right

What users call is what is measured: the functions of `nsa_triton.py` (on a GPU) and `nsa_torch.py` (on a CPU, and up
to 8K tokens on a GPU), the variants `released` and `merged`, and every dense kernel there is, in the same run.
README.md says what a figure includes, docs/add_a_kernel.md what a module offers.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from common import (
    DTYPES,
    OptionParser,
    Results,
    add_options,
    announce,
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
WARM = 2**26  # bytes: keys and values up to this size stay in the L2 cache, nearly all
OVERLAPS = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.96]
CPU_LENGTHS = [256, 1024]  # in the shape of the 7B
# What a module offers, by the parts that are timed.
FUNCTIONS = {
    "compressed": "compressed_attention",
    "select": "select_blocks",
    "selected": "selected_attention",
    "window": "window_attention",
    "whole": "nsa_attention",
}
BRANCHES = ("compressed", "selected", "window")  # in the order of the gates
# The most that a part may differ from nsa_torch in fp64, as in tests/kernel_cases.py: relative RMS of outputs, and of
# gradients; for `select` the share of queries that choose otherwise, since means may be rounded to 16 bits.
ALLOWED = {"fp32": (1e-5, 1e-5, 0.0), "fp16": (3e-3, 5e-3, 0.05), "bf16": (3e-3, 5e-3, 0.05)}
TILE = 16  # adjacent queries whose blocks are united: nearly those of a tile of nsa_triton (18, of 7 heads per KV head)


def parse() -> argparse.Namespace:
    parser = OptionParser(__doc__)
    parser.add_argument("--lengths", type=parse_length, nargs="+",
                        help="tokens (4K ... 256K; --backward: also 36K; without a GPU 256 and 1K)")  # fmt: skip
    parser.add_argument("--backward", action="store_true", help="measure backward and forward+backward, too")
    parser.add_argument("--interleave", action="store_true", help="measure whole and dense in turns, too")
    parser.add_argument("--no_variants", action="store_true", help="leave released and merged out")
    parser.add_argument("--variants", action="store_true", help=argparse.SUPPRESS)  # of an earlier release
    parser.add_argument("--backend", metavar="MODULE", help="a module with our functions' names, timed beside ours")
    parser.add_argument("--overlaps", type=float, nargs="*",
                        help="of the blocks of neighbouring queries, besides random queries "
                        f"({' '.join(map(str, OVERLAPS))}; without a GPU none)")  # fmt: skip
    for name, default in (
        ("heads", 28), ("kv_heads", 4), ("head_dim", 128), ("block_size", 64), ("block_count", 32), ("window_size", 256)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    add_options(parser)
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    if args.lengths is None:
        args.lengths = sorted([2**i for i in range(12, 19)] + [36864] * args.backward) if on_gpu else CPU_LENGTHS
    if args.overlaps is None:
        args.overlaps = OVERLAPS if on_gpu else []
    args.passes = PASSES if args.backward else PASSES[:1]
    if not on_gpu:
        print("attention.py: no GPU, so nsa_torch is timed and no kernel; --lengths 256 1K ends, long streams do not")
    return args


@door
def main() -> None:
    args = parse()
    device = torch.device(args.device)
    args.modules = [nsa_triton if device.type == "cuda" else nsa_torch]
    args.errors = {}
    if args.backend:
        args.modules.append(load_backend(args.backend))
        args.errors = check(args, device)
    shape = ("dtype", "heads", "kv_heads", "head_dim", "block_size", "block_count", "window_size")
    same = {"benchmark": "attention", **environment(device, args.date), **{name: getattr(args, name) for name in shape}}
    announce(same)
    for tokens in args.lengths:
        results = Results(args.output / "attention.json", {**same, "tokens": tokens})
        for rows in measure_length(tokens, device, args):
            results.write(rows)
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
            columns = (*columns, *["l2"] * args.interleave, *["error"] * bool(args.backend))
            print_table((*columns, "speedup"), timed)
        for row in rows:
            if "skipped" in row:
                print(f"skipped: {row['part']} {row['kernel']}, {row['pass']}: {row['skipped']}")
        results.write(rows)


@torch.no_grad()
def measure_length(tokens: int, device: torch.device, args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows for all dense kernels, branches, selections and passes at one length; after each group, all rows so far."""
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
            row = {"part": part, "kernel": name_of(module)}
            row |= {} if part in ("compressed", "window") else selection
            row |= {"error": args.errors[row["kernel"], part]} if module in args.modules and args.errors else {}
            call, tensors = calls[part]
            for name in args.passes if tensors else args.passes[:1]:
                rows.append({**row, "pass": name, **time_pass(name, call, tensors, timed)})
        return rows

    rows = dense_rows(queries(1.0), k, v, args.passes, timed)
    yield rows
    fast = args.modules
    for module in [*fast, nsa_torch] if nsa_torch not in fast and tokens <= SMALL else fast:
        q = queries(1.0)
        lse, blocks = choose(module, q)
        random = {"selection": "random", **statistics_of(blocks)}
        rows += time_branches(module, q, lse, blocks, FUNCTIONS, random)
        yield rows

    if not args.no_variants:
        rows += variant_rows(fast[0], queries(1.0), k, v, gates, args, timed)
        yield rows
    if args.interleave:
        rows += interleaved_rows(fast, queries(1.0), k, v, gates, cu_seqlens, random, rows, args, device)
        yield rows
    for target in args.overlaps:
        if random["overlap"] is None or target <= random["overlap"]:
            continue  # there is no choice, or random selections overlap more than that
        q = queries(noise_for(target, lambda noise: statistics_of(choose(fast[0], queries(noise))[1])["overlap"]))
        for module in fast:
            lse, blocks = choose(module, q)
            correlated = {"selection": f"overlap {target}", **statistics_of(blocks)}
            rows += time_branches(module, q, lse, blocks, ("selected", "whole"), correlated)
            yield rows
        if args.interleave:
            rows += interleaved_rows(fast, q, k, v, gates, cu_seqlens, correlated, rows, args, device)
            yield rows


def load_backend(name: str):
    """The module of that name, which may lie in the working directory.

    Raises:
        ValueError: it cannot be imported, or lacks one of `FUNCTIONS`.
    """
    sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--backend {name} cannot be imported: {error}") from error
    missing = [function for function in FUNCTIONS.values() if not callable(getattr(module, function, None))]
    if missing:
        raise ValueError(f"--backend {name} has no {', '.join(missing)}")
    return module


def name_of(module) -> str:
    """`triton` and `torch` for ours."""
    return module.__name__.removeprefix("videonsa.nsa_")


def check(args: argparse.Namespace, device: torch.device) -> dict[tuple[str, str], float]:
    """By kernel and part, how far the modules are from nsa_torch in fp64: see `ALLOWED`. With --backward the larger one
    of output and gradients.

    Raises:
        ValueError: one is too far away.
    """
    lengths = [(args.block_count + 3) * args.block_size + 5, args.block_size + 1]
    generator = torch.Generator().manual_seed(0)
    new = functools.partial(torch.randn, generator=generator)
    tensors = [new(sum(lengths), heads, args.head_dim) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    tensors.append(new(sum(lengths), args.heads, len(BRANCHES)).sigmoid())
    tensors = [x.to(device, DTYPES[args.dtype]) for x in tensors]
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)

    errors, (output, gradient, choice) = {}, ALLOWED[args.dtype]
    for module in args.modules:
        for part, found in errors_of(module, *tensors, cu_seqlens, args).items():
            allowed = choice if part == "select" else gradient if args.backward else output
            if not found <= allowed:  # also where it is not a number
                name = f"{FUNCTIONS[part]} of {name_of(module)}"
                raise ValueError(f"{name} differs from nsa_torch by {found:.2g}; allowed is {allowed:.2g}")
            errors[name_of(module), part] = round(found, 7)
    return errors


def errors_of(module, q, k, v, gates, cu_seqlens, args) -> dict[str, float]:
    """By part: see `check`. Both sides take the blocks that the module chose: a near tie is counted once."""
    options = {"block_size": args.block_size}
    with torch.no_grad():
        _, lse = module.compressed_attention(q, k, v, cu_seqlens, **options)
        blocks = module.select_blocks(q, k, lse, cu_seqlens, **options, block_count=args.block_count)
    calls = branch_calls(module, q, k, v, gates, lse, blocks, cu_seqlens, args)
    doubles = [x.double() for x in (q, k, v, gates)]
    expected = branch_calls(nsa_torch, *doubles, lse.double(), blocks, cu_seqlens, args)

    def gated_sum(q, k, v, gates):
        return sum(gates[..., b, None] * expected[part][0](q, k, v) for b, part in enumerate(BRANCHES))

    expected["whole"] = gated_sum, tuple(doubles)
    errors = {}
    for part in FUNCTIONS:
        pairs = list(zip(*(results(*side[part], args.backward) for side in (calls, expected)), strict=True))
        if part == "select":
            ((mine, reference),) = pairs
            errors[part] = (mine != reference).any(-1).double().mean().item()
        else:
            errors[part] = max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)
    return errors


def results(call, tensors: tuple, with_gradients: bool) -> list[torch.Tensor]:
    """Of call(*tensors) the output and, if there are any, the gradients."""
    with torch.set_grad_enabled(with_gradients):
        leaves = [x.detach().requires_grad_(with_gradients) for x in tensors]
        out = call(*leaves)
        if not with_gradients or not tensors:
            return [out.detach()]
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


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


def variant_rows(module, q, k, v, gates, args, timed) -> list[dict]:
    """Rows of the other variants in all passes; where a shape does not fit one, the row says why."""
    rows = []
    for (part, (call, tensors)), name in itertools.product(
        variant_calls(module, q, k, v, gates, args).items(), args.passes
    ):
        row = {"part": part, "kernel": name_of(module), "selection": "random", "pass": name}
        try:
            rows.append({**row, **time_pass(name, call, tensors, timed)})
        except (RuntimeError, ValueError) as error:
            rows.append({**row, "skipped": str(error).split("\n")[0]})
    return rows


def variant_calls(module, q, k, v, gates, sizes) -> dict[str, tuple]:
    """As `branch_calls`, of the other variants over the same vision tokens: `released` without text, `merged` after 64
    tokens of it."""
    blocking = {"block_size": sizes.block_size, "block_count": sizes.block_count}
    vision = torch.ones(len(q), dtype=torch.bool, device=q.device)
    stream = nsa_released.Stream.make(vision, len(q), **blocking)
    lengths = (torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (len(q), min(64, len(k))))
    seen = torch.full((len(q),), min(64, len(k)), dtype=torch.int32, device=q.device)
    places = (seen, *lengths)
    options = {**blocking, "window_size": sizes.window_size}
    options["triton"] = module is nsa_triton
    return {
        "released": (
            lambda q, k, v, gates: nsa_released.released_attention(q, k, v, gates, stream, **options),
            (q, k, v, gates),
        ),
        "merged": (
            lambda q, k, v: nsa_merged.merged_attention(q, k, v, k[:64], v[:64], *places, **options),
            (q, k, v),
        ),
    }


def interleaved_rows(modules, q, k, v, gates, cu_seqlens, selection, rows, sizes, device) -> list[dict]:
    """The forward pass of the whole in turns with the dense kernels that have been measured, with a cold L2 cache and
    with a warm one where keys and values fit in it."""
    blocking = {"block_size": sizes.block_size, "block_count": sizes.block_count, "window_size": sizes.window_size}
    calls = {
        ("whole", name_of(module)): functools.partial(module.nsa_attention, q, k, v, gates, cu_seqlens, **blocking)
        for module in modules
    }
    # The note says which of the ways to call it the kernel took. Rows of earlier turns have none.
    alone = [row for row in rows if row["part"] == "dense" and "ms" in row and "order" not in row]
    noted = {row["kernel"]: row["note"] for row in alone}
    for name, ways in dense_calls(q, k, v).items():
        if name in noted:
            call, tensors = next((call, tensors) for note, call, tensors in ways if note == noted[name])
            calls["dense", name] = functools.partial(call, *tensors)
    found = []
    for l2 in ("cold", "warm") if k.nbytes + v.nbytes <= WARM else ("cold",):
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
