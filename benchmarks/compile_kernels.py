"""Compiles the kernels for a GPU that is not there, reads the machine code, and predicts times from it.

    python benchmarks/compile_kernels.py                    # sm_90, the shape of the 7B: a table per kernel and loop
    python benchmarks/compile_kernels.py 89 "7B fp32"       # another compute capability, another of CASES
    python benchmarks/compile_kernels.py 90 --json --sass build/sass     # rows for programs, machine code for people
    python benchmarks/compile_kernels.py --predict          # times on an H200, also to results/predicted.json

The public functions are called as users call them, on CPU tensors; each launch is turned into a compilation with the
specialisation that the same arguments would get on the GPU. Needs neither a driver nor nvcc: ptxas and cuobjdump are in
triton's wheel. What is read is true of the code; what is predicted, by `simulate`, is a model, and no measurement.
"""

import argparse
import heapq
import json
import re
import subprocess
import tempfile
from collections import deque
from pathlib import Path

import torch

# name: dtype, head dim, query heads, KV heads, block size, block count
CASES = {
    "7B bf16": (torch.bfloat16, 128, 28, 4, 64, 32),
    "7B bf16 released": (torch.bfloat16, 128, 28, 4, 64, 8),
    "7B fp32": (torch.float32, 128, 28, 4, 64, 8),
    "fp16 dim 80 group 16 block 128": (torch.float16, 80, 16, 1, 128, 5),
    "bf16 dim 32 group 1 block 16": (torch.bfloat16, 32, 2, 2, 16, 5),
    "Qwen3-VL 2B bf16": (torch.bfloat16, 128, 16, 8, 64, 32),
    "Qwen3-VL 8B bf16": (torch.bfloat16, 128, 32, 8, 64, 32),
    "Qwen3-VL 32B bf16": (torch.bfloat16, 128, 64, 8, 64, 32),
}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes per program
LENGTH = 131072  # tokens; their memory is reserved, not touched
TRAINED = 4096  # tokens of a call with a gradient; as of any number that leaves a choice of blocks
SHORT = 64  # tokens of a call where all blocks are chosen


def main() -> None:
    import common  # makes `videonsa` importable; not above, since tests that import this file have it already

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, nargs="?", default=90, choices=SHARED_MEMORY, help="(%(default)s)")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"(7B bf16; --json: all) {', '.join(CASES)}")
    parser.add_argument("--json", action="store_true", help="print a JSON list, a row per case and compiled kernel")
    parser.add_argument("--sass", type=Path, metavar="FOLDER", help="also write the machine code of each kernel there")
    parser.add_argument("--predict", action="store_true", help="print and write predicted times (sm_90, 7B bf16)")
    args = parser.parse_args()
    if args.predict and (args.capability, args.cases) != (90, []):
        parser.error("--predict takes neither a compute capability nor cases: it is for sm_90 and 7B bf16")
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    rows = compile_all(args.capability, args.cases or (CASES if args.json else ["7B bf16"]), args.sass)
    if args.predict:
        predicted = predict(rows)
        common.print_table(("tokens", "pass", "part", "ms_low", "ms_high"), predicted)
        lines = ",\n".join(map(json.dumps, predicted))
        (common.RESULTS / "predicted.json").write_text(f"[\n{lines}\n]\n")
    elif args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_rows(rows)


class Driver:
    """As much of triton's driver as a compilation asks for."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_all(capability: int, names, sass_folder: Path | None = None) -> list[dict]:
    import triton
    from triton.runtime.driver import driver

    from videonsa import nsa_launches, nsa_merged, nsa_released, nsa_triton

    driver.set_active(Driver(capability))
    nsa_triton._can_launch = lambda device: True
    nsa_launches.capability = nsa_triton.capability = lambda device: divmod(capability, 10)
    run, compiled = triton.JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        binary = run(self, *args, grid=grid, warmup=True, **options)
        sizes = {name: options[name] for name in ("BM", "BN", "BQ", "S") if isinstance(options.get(name), int)}
        compiled.setdefault((self.__name__, binary.hash), (binary, sizes))

    triton.JITFunction.run = compile_only
    rows = []
    for name in names:
        dtype, dim, heads, groups, block_size, block_count = CASES[name]
        compiled.clear()
        calls = [(TRAINED, True), (SHORT, False), (SHORT, True)]
        if name == "7B bf16":  # once is enough
            calls = [(LENGTH, False), *calls]
        for length, trained in calls:
            q = torch.zeros(length, heads, dim, dtype=dtype, requires_grad=trained)
            k = torch.zeros(length, groups, dim, dtype=dtype, requires_grad=trained)
            gates = torch.zeros(length, heads, 3, dtype=dtype)
            cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
            sizes = {"block_size": block_size, "block_count": block_count}
            if "released" in name:
                vision = torch.arange(length) > 9
                stream = nsa_released.Stream.make(vision, length, **sizes)
                out = nsa_released.released_attention(q, k, k.clone(), gates[10:], stream, triton=True, **sizes)
            else:
                out = nsa_triton.nsa_attention(q, k, k.clone(), gates, cu_seqlens, **sizes)
            if length == TRAINED:
                # Of fewer blocks than there are, so that there is a choice.
                lse, few = torch.zeros(length, heads), {"block_size": block_size, "block_count": 3}
                nsa_triton.select_blocks(q.detach(), k.detach(), lse, cu_seqlens, **few, spread=True)
            if trained:
                out.backward(torch.zeros_like(out))
            if length == TRAINED and name == "7B bf16":
                compile_merged(nsa_merged, q, k, cu_seqlens, sizes)
        for (kernel, _), (binary, tile) in compiled.items():
            rows.append({"case": name, "kernel": kernel, **tile, **read(binary, capability, sass_folder)})
    return rows


def compile_merged(nsa_merged, q, k, cu_seqlens, sizes) -> None:
    """With either estimate of importance, with and without what changes the choice, and the remainder."""
    text, seen = torch.zeros_like(k[:50]), torch.zeros(len(q), dtype=torch.int32)
    arguments = (q, k, k.clone(), text, text, seen, cu_seqlens, torch.tensor([0, 50], dtype=torch.int32))
    with torch.no_grad():
        nsa_merged.merged_attention(*arguments, **sizes, window_size=16, spread=False, triton=True)
    sizes = {**sizes, "window_size": 16, "remainder": True}
    out = nsa_merged.merged_attention(*arguments, **sizes, triton=True)
    out.backward(torch.zeros_like(out))


def read(kernel, capability: int, sass_folder: Path | None = None) -> dict:
    """What the compiled kernel uses, and of each innermost loop that multiplies matrices what `read_loop` says."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    if sass_folder:
        sass_folder.mkdir(parents=True, exist_ok=True)
        (sass_folder / f"{kernel.metadata.name}-{kernel.hash[:8]}.sass").write_text(sass)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    loops = _loops(code)
    programs = programs_per_sm(registers, shared, warps, capability)
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(map(_is_spill, code)),
        "spills_in_loops": sum(_is_spill(line) for line in code if any(a <= line[0] <= b for a, b in loops)),
        "shared": shared,
        "warps": warps,
        "stages": kernel.metadata.num_stages,
        "programs": programs,
        "instructions": len(code),
        "wgmma": sum("HGMMA" in text for _, text in code),
        "loops": [
            read_loop([text for address, text in code if start <= address <= end], warps, programs)
            for start, end in _loops(code, innermost=True)
            if any("MMA" in text for address, text in code if start <= address <= end)
        ],
    }


def programs_per_sm(registers: int, shared: int, warps: int, capability: int) -> int:
    """As many as registers, shared memory (1 KB of each is the system's) and warps allow."""
    of_an_sm = {80: 164, 89: 100, 90: 228}[capability] * 1024
    registers = -(-registers // 8) * 8 * 32 * warps
    return min(65536 // registers, of_an_sm // (shared + 1024), (48 if capability == 89 else 64) // warps)


def read_loop(body: list[str], warps: int, programs: int) -> dict:
    """Of the instructions of a turn of a loop:

    arrivals    how often it waits for operands of wgmma to be ready: once per dot, unless ptxas serialised its wgmma
    copies      asynchronous copies of 16 bytes per thread
    in_flight   for each wait for copies, how many groups of them it leaves under way: with 0, it waits for what it has
                issued last, and what runs meanwhile is only what stands between
    loads       synchronous loads of 16 bytes per thread: 0, unless keys are not loaded ahead at all
    cycles      on sm_90, what `simulate` makes of a turn on one SM, fastest and slowest memory; None elsewhere
    tensor      on sm_90, the cycles of a turn's matrix products at the full rate
    """
    loop = {
        "instructions": len(body),
        "arrivals": sum("WARPGROUP.ARRIVE" in text for text in body),
        "copies": sum(_is_copy(text) for text in body),
        "in_flight": [int(n, 16) for text in body for n in re.findall(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)", text)],
        "loads": sum("LDG.E.128" in text for text in body),
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body),
    }
    if any("HGMMA" in text for text in body):
        steps = loop_steps(body)
        loop["tensor"] = round(sum(c for kind, c in steps if kind == "dot") * programs * warps / 4)
        loop["cycles"] = [round(simulate(steps, warps // 4, programs, *memory)) for memory in MEMORY]
    return loop


def _is_copy(text: str) -> bool:
    return "LDGSTS" in text and ".128" in text


def _is_spill(line) -> bool:
    return bool(re.search(r"\b(LDL|STL)\b", line[1]))


def _loops(code, innermost: bool = False) -> list[tuple[int, int]]:
    """First and last address of each loop: of what branches backwards, but the idle loop at the end."""
    loops = [
        (int(target[1], 16), address)
        for address, text in code
        if re.search(r"\bBRA\b", text)
        and (target := re.search(r"0x([0-9a-f]+)", text))
        and int(target[1], 16) < address
    ]
    if innermost:
        return [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return loops


# Bytes per cycle that an SM gets from L2, and cycles until the first arrive: the best and the worst that seem likely,
# as 5.5-7 TB/s in all were assumed (README.md).
MEMORY = ((32, 400), (24, 700))
ALONE = 1.25  # a warp that has a scheduler to itself needs so much longer than a cycle per instruction
QUANTUM = 16  # instructions after which another warp of a scheduler has its turn


def loop_steps(body: list[str]) -> list[tuple]:
    """The instructions of a warp as steps of `simulate`: runs of ordinary ones (with cycles of their scheduler; of its
    exponentials one takes 8), matrix products of its warp group (with cycles of the tensor cores), and what waits."""
    steps, instructions, exponentials = [], 0, 0

    def end_run():
        nonlocal instructions, exponentials
        steps.append(("run", max(instructions, 8 * exponentials)))
        instructions = exponentials = 0

    for text in body:
        instructions += "NOP" not in text
        exponentials += "MUFU" in text
        dot = re.search(r"HGMMA\.64x(\d+)x16\.\S+ \w+, (\w+)", text)
        done = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text)
        landed = re.search(r"(?<!\.)\bDEPBAR\.LE SB0, (0x[0-9a-f]+)", text)
        if dot:
            # Operands in shared memory are read at 128 bytes per cycle: narrow products wait for the other side.
            columns, from_shared = int(dot[1]), dot[2].startswith("gdesc")
            end_run()
            steps.append(("dot", max(columns / 2, (2048 * from_shared + 32 * columns) / 128)))
            if "gsb0" in text:
                steps.append(("dots issued", 0))
        elif done:
            end_run()
            steps.append(("dots done", int(done[1], 16)))
        elif landed:
            end_run()
            steps.append(("copies landed", int(landed[1], 16)))
        elif "LDGDEPBAR" in text:
            steps.append(("copies issued", 0))
        elif "BAR.SYNC" in text:
            end_run()
            steps.append(("barrier", 0))
        elif _is_copy(text):
            steps.append(("copy", 4 * 32 * 16))  # bytes of the four warps of a group
    end_run()
    return steps


def simulate(steps, groups: int, programs: int, rate: float, latency: float, turns: int = 40) -> float:
    """Cycles of a turn, in the long run, of `programs` programs of `groups` warp groups on one SM.

    A model in place of a machine: the tensor cores take products in the order of their coming; warps that share a
    scheduler take turns, a warp alone loses a quarter; copies arrive in order, `latency` cycles after they were issued
    and `rate` bytes per cycle; barriers hold a program's groups together. All other waits are left out.
    """
    agents = [Agent(program, deque([0.0] * 8), deque([0.0] * 8)) for program in range(programs) for _ in range(groups)]
    scheduler = tensor = memory = 0.0
    waiting = {program: [] for program in range(programs)}
    queue = [(0.0, index, index) for index in range(len(agents))]  # time, tie-break, agent
    order, ends = len(agents), [[] for _ in agents]
    while queue:
        now, _, index = heapq.heappop(queue)
        agent = agents[index]
        kind, size = steps[agent.at]
        finished = True
        if kind == "run":
            part = min(QUANTUM, size - agent.done)
            scheduler = max(scheduler, now) + part
            now = max(scheduler, now + part * ALONE)
            agent.done += part
            finished = agent.done >= size
        elif kind == "dot":
            tensor = max(tensor, now) + size
            agent.last_dot = tensor
        elif kind == "dots issued":
            agent.dots.append(agent.last_dot)
        elif kind == "dots done":
            now = max(now, agent.dots[-1 - size])
        elif kind == "copy":
            memory = max(memory, now + latency) + size / rate
            agent.last_copy = memory
        elif kind == "copies issued":
            agent.copies.append(agent.last_copy)
        elif kind == "copies landed":
            now = max(now, agent.copies[-1 - size])
        if finished:
            agent.at, agent.done = agent.at + 1, 0
            if agent.at == len(steps):
                agent.at = 0
                ends[index].append(now)
        if len(ends[index]) == turns:
            continue
        if kind == "barrier" and groups > 1:
            waiting[agent.program].append(index)
            if len(waiting[agent.program]) < groups:
                continue
            released, waiting[agent.program] = waiting[agent.program], []
        else:
            released = [index]
        for index in released:
            heapq.heappush(queue, (now, order, index))
            order += 1
    first, last = turns // 2, turns - 1
    return max((times[last] - times[first]) / (last - first) for times in ends)


class Agent:
    """A warp group: where in the turn it is, and when its last dots and copies are done."""

    def __init__(self, program, dots, copies):
        self.program, self.dots, self.copies = program, dots, copies
        self.at, self.done, self.last_dot, self.last_copy = 0, 0, 0.0, 0.0


# An H200, and the mean number of blocks of 16 adjacent queries whose neighbours' overlap 0.9.
SMS, GHZ, UNION = 132, 1.7, 43
ALL = 32 * 64  # tokens up to which all blocks are chosen
BUSY = 0.9  # the share of the time in which all SMs have work
START = 2500  # cycles of a program before and after its loops
# ms at 64K of what has no loop of matrix products, lowest and highest, and the power of the length that it grows with:
# see README.md
OTHERS = {
    "forward": {"means_kernel": (0.03, 0.03, 1), "top_kernel": (1.1, 2.0, 2), "union_kernel": (0.15, 0.2, 1)},
    "backward": {
        "dots_kernel": (0.5, 0.5, 1),
        "union_kernel": (0.15, 0.2, 1),
        "lists of queries": (1.4, 1.4, 1),
        "collect_kernel": (0.7, 0.7, 1),
    },
}
LEAST = 0.003  # ms of any launch, however short
# Beyond so many tokens, blocks are chosen for some queries at a time, from rows two thirds as wide on average.
ONE_CHUNK, NARROW = 32768, 2 / 3
# ms of a decoder layer per token: other matrix products, at 650 TFLOP/s, and the gate network; and, per token squared,
# FlashAttention-3 at 650 TFLOP/s.
PRODUCTS, GATES, FLASH = 23.5 / 32768, 1.3 / 32768, 28 * 128 * 2 / 650e9
SHARES = 0.5  # ms at 64K that the gated sum adds to the forward pass: the output is written three times and read twice


def predict(rows: list[dict]) -> list[dict]:
    """Lowest and highest ms of each kernel, of what attention.py calls parts, of both passes, and of a decoder layer.

    In the shape of the 7B (28 query heads, 4 KV heads, 32 blocks of 64, a window of 256), at an overlap of 0.9.
    """
    kernels = {}
    for row in rows:
        kernels.setdefault((row["kernel"], row.get("S", 64)), row)  # the first is that of `nsa_attention`
    times, passes = [], {"forward": (1, 2, 4, 8, 32, 36, 64, 128), "backward": (36, 64)}
    for name, tokens in [(name, n * 1024) for name, lengths in passes.items() for n in lengths]:
        parts = {}
        for part, (kernel, size), programs, turns in work(kernels, tokens, name):
            row = kernels[kernel, size]
            total = []
            for memory in range(2):
                cycles = sum(n * loop["cycles"][memory] for n, loop in zip(turns, row["loops"], strict=True))
                time = programs * (cycles + START) / row["programs"] / SMS / BUSY / GHZ / 1e6
                total.append(max(time, LEAST))
            parts[f"{kernel}, {part}"] = total
        for other, (low, high, power) in OTHERS[name].items():
            if tokens > ALL or other not in ("top_kernel", "union_kernel"):
                share = NARROW if other == "top_kernel" and tokens > ONE_CHUNK else 1
                parts[other] = [max(x * share * (tokens / 65536) ** power, LEAST) for x in (low, high)]
        if name == "forward":
            parts["gated sum"] = [SHARES * tokens / 65536] * 2
        parts["whole"] = [sum(x[i] for x in parts.values()) for i in range(2)]
        if name == "forward":
            if tokens > ALL:
                both = (parts["selected_kernel, selected"], parts["union_kernel"])
                parts["selected"] = [sum(x[i] for x in both) for i in range(2)]
            parts["decoder layer"] = [x + (PRODUCTS + GATES) * tokens for x in parts["whole"]]
            parts["decoder layer, dense"] = [PRODUCTS * tokens + FLASH * tokens**2] * 2
        for part, (low, high) in parts.items():
            figures = {"ms_low": float(f"{low:.3g}"), "ms_high": float(f"{high:.3g}")}
            times.append({"tokens": tokens, "pass": name, "part": part, **figures})
    return times


def work(kernels: dict, tokens: int, name: str):
    """(part, kernel and tokens per key, programs, mean turns of each loop of a program) of the launches of a pass."""
    blocks = tokens / 64
    band, selected = "band_kernel", "selected_kernel"
    if name == "backward":
        band, selected = "band_dq_kernel", "selected_dq_kernel"
    rows, keys = kernels[band, 64]["BM"], kernels[band, 64]["BN"]
    one_loop = len(kernels[band, 64]["loops"]) == 1
    turns = blocks / 2 / keys
    yield "compressed", (band, 64), 28 * tokens / rows, [turns + 1] if one_loop else [turns, 1]
    turns = (rows + 256) / keys
    yield "window", (band, 1), 28 * tokens / rows, [turns] if one_loop else [0, turns]
    if tokens <= ALL:
        yield "selected", (band, 1), 28 * tokens / rows, [tokens / 2 / keys - 1, rows / keys]
        return
    queries = kernels[selected, 64]["BQ"]
    yield "selected", (selected, 64), 4 * tokens / queries, [min(UNION + (queries - 16) / 4, blocks / 2) - 1, 1.25]
    if name == "forward":
        row = kernels["importance_kernel", 64]
        yield "select", ("importance_kernel", 64), 4 * tokens / row["BM"] * blocks / row["BN"] / 2, [7]
    else:
        row = kernels["band_dkv_kernel", 1]
        queries = row["BM"]
        yield "window", ("band_dkv_kernel", 1), 4 * tokens / row["BN"], [7 * (row["BN"] + 256) / queries]
        programs = max(1024, 4 * blocks / row["BN"])  # queries are split over them
        turns = 4 * 7 * tokens / 2 * blocks / row["BN"] / queries
        yield "compressed", ("band_dkv_kernel", 64), programs, [turns / programs]
        queries = kernels["selected_dkv_kernel", 64]["BQ"]
        yield "selected", ("selected_dkv_kernel", 64), 4 * blocks, [tokens * 32 / blocks / queries]


def print_rows(rows: list[dict]) -> None:
    from common import print_table

    lines = []
    for row in rows:
        line = {**row, "shared_kb": round(row["shared"] / 1024, 1)}
        for number, loop in enumerate(row["loops"] or [{}]):
            lines.append({**(line if number == 0 else {}), **loop, "turn": loop.get("instructions")})
    columns = ("case", "kernel", "BM", "BQ", "BN", "warps", "stages", "registers", "shared_kb", "programs")
    columns = (*columns, "spills_in_loops")
    print_table((*columns, "turn", "arrivals", "copies", "loads", "in_flight", "tensor", "cycles"), lines)


if __name__ == "__main__":
    from common import door

    door(main)()
