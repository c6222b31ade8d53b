"""One attention layer without a GPU: the PyTorch path against dense SDPA, in time and memory.

    python benchmarks/cpu.py --threads 1                  # the table: `TABLE`, some with a quarter of the heads
    python benchmarks/cpu.py --lengths 1K 4K              # these lengths, shape of the 7B, fp32
    python benchmarks/cpu.py --backward --lengths 4K 16K

Without --lengths, `TABLE` overrides the other options. Both run turn and turn about in one process; `ratio` is the
median over the rounds of their times' quotient. Times are those of the processor, which other work on the machine
disturbs less than the clock's. Memory is the peak of a process of its own beyond that with inputs alone (Linux).
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch
from common import (
    DTYPES,
    ROOT,
    OptionParser,
    add_output_options,
    announce,
    append_rows,
    door,
    environment,
    parse_length,
    print_table,
    time_calls,
)
from torch.nn.functional import scaled_dot_product_attention

from videonsa.nsa_merged import merged_attention
from videonsa.nsa_released import Stream, released_attention
from videonsa.nsa_torch import nsa_attention

K = 1024
QUARTER = {"heads": 7, "kv_heads": 1}  # of the 7B: times are linear in KV heads
TABLE = [
    {"lengths": [K, 2 * K, 4 * K, 8 * K]},
    {"lengths": [8 * K, 16 * K, 32 * K], **QUARTER},
    {"lengths": [K, 4 * K, 16 * K], **QUARTER, "dtype": "bf16"},
    {"lengths": [K, 4 * K, 16 * K], **QUARTER, "backward": True},
    {"lengths": [4 * K, 16 * K], **QUARTER, "nsa_variant": "merged"},
    {"lengths": [4 * K, 16 * K], **QUARTER, "nsa_variant": "released"},
]
TEXT = 16  # tokens before the video that "merged" and "released" see
MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import cpu

args = cpu.argparse.Namespace(**cpu.json.loads(sys.argv[4]))
calls = cpu.make_calls(int(sys.argv[2]), args)
cpu.make_calls(128, args)[sys.argv[3]]()
before = cpu.peak()
calls[sys.argv[3]]()
print((cpu.peak() - before) / 1024)
"""


def parse(arguments=None) -> argparse.Namespace:
    parser = OptionParser(__doc__)
    parser.add_argument("--lengths", type=parse_length, nargs="+", help="tokens (default: the table)")
    for name, default in (("heads", 28), ("kv_heads", 4), ("head_dim", 128), ("threads", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--nsa_variant", default="paper", choices=("paper", "merged", "released"), help="(%(default)s)")
    parser.add_argument("--backward", action="store_true", help="forward and backward pass, not forward alone")
    add_output_options(parser)
    return parser.parse_args(arguments)


@door
def main() -> None:
    given = parse()
    rows = []
    for case in [{}] if given.lengths else TABLE:
        rows += measure(argparse.Namespace(**{**vars(given), **case}))
    print_table(tuple(rows[0]), rows)


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each length, also written to the file of results."""
    shape = ("dtype", "heads", "kv_heads", "head_dim", "threads", "nsa_variant")
    same = {"benchmark": "cpu", **environment(torch.device("cpu"), args.date), **{x: getattr(args, x) for x in shape}}
    same |= {"pass": "forward + backward" if args.backward else "forward", "rounds": args.rounds}
    announce(same)
    rows = []
    for tokens in args.lengths:
        times = time_calls(make_calls(tokens, args), args.rounds)
        ratio = statistics.median(sparse / dense for dense, sparse in zip(*times.values(), strict=True))
        medians = {f"{name}_ms": 1000 * statistics.median(x) for name, x in times.items()}
        peaks = {f"{name}_peak_mb": peak_mb(name, tokens, args) for name in times}
        row = {"tokens": tokens, "ratio": ratio, **medians, **peaks}
        append_rows(args.output / "cpu.json", [same | row])
        rows.append({x: same[x] for x in (*shape, "pass")} | row)
    return rows


def make_calls(tokens: int, args: argparse.Namespace) -> dict:
    """Functions that run one pass, over the same random inputs."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options = {"dtype": DTYPES[args.dtype], "requires_grad": args.backward}
    q = torch.randn(tokens, args.heads, args.head_dim, **options)
    k, v = (torch.randn(tokens, args.kv_heads, args.head_dim, **options) for _ in range(2))
    gates = torch.rand(tokens, args.heads, 3, **options)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)

    def dense():
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)

    def sparse():
        if args.nsa_variant == "paper":
            return nsa_attention(q, k, v, gates, cu_seqlens)
        if args.nsa_variant == "released":
            vision = torch.arange(tokens) >= TEXT
            return released_attention(q, k, v, gates[TEXT:], Stream.make(vision, tokens, 64, 32))
        video = [x[TEXT:] for x in (q, k, v)]
        text = k[:TEXT], v[:TEXT], torch.full((tokens - TEXT,), TEXT, dtype=torch.int32)
        lengths = (torch.tensor([0, n], dtype=torch.int32) for n in (tokens - TEXT, TEXT))
        return merged_attention(*video, *text, *lengths)

    def whole(call):
        out = call()
        if args.backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return {"dense": lambda: whole(dense), "nsa": lambda: whole(sparse)}


def peak() -> int:
    """Peak memory of this process in kB; ru_maxrss would begin with that of its parent."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def peak_mb(name: str, tokens: int, args: argparse.Namespace) -> float:
    """Peak memory of a call in a process of its own, less that before it, in MB."""
    options = json.dumps(vars(args), default=str)
    command = [sys.executable, "-c", MEMORY, str(ROOT / "benchmarks"), str(tokens), name, options]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
