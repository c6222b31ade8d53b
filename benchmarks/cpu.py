"""One attention layer without a GPU: the PyTorch path against dense SDPA, in time and memory.

    python benchmarks/cpu.py                                     # 1K ... 16K tokens, shape of the 7B, fp32, one thread
    python benchmarks/cpu.py --heads 7 --kv_heads 1 --lengths 32K    # a quarter of the work
    python benchmarks/cpu.py --backward --lengths 4K 16K

Both run turn and turn about in one process; `ratio` is the median over the rounds of their times' quotient. Times are
those of the processor, which other work on the machine disturbs less than the clock's. Memory is the peak of a process
of its own beyond that with inputs alone (Linux).
"""

import argparse
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
    environment,
    parse_length,
    print_table,
    time_calls,
)
from torch.nn.functional import scaled_dot_product_attention

from videonsa.nsa_torch import nsa_attention

MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import cpu

args = cpu.parse(sys.argv[4:])
calls = cpu.make_calls(int(sys.argv[2]), args)
cpu.make_calls(128, args)[sys.argv[3]]()
before = cpu.peak()
calls[sys.argv[3]]()
print((cpu.peak() - before) / 1024)
"""


def parse(arguments=None) -> argparse.Namespace:
    parser = OptionParser(__doc__)
    lengths = [1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--lengths", type=parse_length, nargs="+", default=lengths, help="tokens (1K ... 16K)")
    for name, default in (("heads", 28), ("kv_heads", 4), ("head_dim", 128), ("threads", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--backward", action="store_true", help="forward and backward pass, not forward alone")
    add_output_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    shape = ("dtype", "heads", "kv_heads", "head_dim", "threads", "rounds")
    same = {"benchmark": "cpu", **environment(torch.device("cpu"), args.date), **{x: getattr(args, x) for x in shape}}
    same["pass"] = "forward + backward" if args.backward else "forward"
    announce(same)
    rows = []
    for tokens in args.lengths:
        times = time_calls(make_calls(tokens, args), args.rounds)
        ratio = statistics.median(sparse / dense for dense, sparse in zip(*times.values(), strict=True))
        medians = {f"{name}_ms": 1000 * statistics.median(x) for name, x in times.items()}
        peaks = {f"{name}_peak_mb": peak_mb(name, tokens) for name in times}
        rows.append({"tokens": tokens, "ratio": ratio, **medians, **peaks})
        append_rows(args.output / "cpu.json", [same | rows[-1]])
    print_table(tuple(rows[0]), rows)


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
        return nsa_attention(q, k, v, gates, cu_seqlens)

    def whole(call):
        out = call()
        if args.backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return {"dense": lambda: whole(dense), "nsa": lambda: whole(sparse)}


def peak() -> int:
    """Peak memory of this process in kB; ru_maxrss would begin with that of its parent."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def peak_mb(name: str, tokens: int) -> float:
    """Peak memory of a call in a process of its own, less that before it, in MB."""
    command = [sys.executable, "-c", MEMORY, str(ROOT / "benchmarks"), str(tokens), name, *sys.argv[1:]]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
