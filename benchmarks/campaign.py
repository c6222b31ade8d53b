"""All GPU figures of this repository by one command, the most valuable first, in under ten minutes.

    python benchmarks/campaign.py                           # any GPU from sm_80 on; no network
    python benchmarks/campaign.py --resume                  # goes on where a run was cut short
    python benchmarks/campaign.py --dry_run                 # anywhere: every part at a toy size

Each part runs in a process of its own with a time limit. After each, what it found is in the folder of results: its
rows in the JSON files of the scripts, its output in `campaign.txt`, how it ended in `campaign.json`, and in
`campaign.md` a table that sets each figure beside what `compile_kernels.py` predicted (`predicted.json`).
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import RESULTS, ROOT, OptionParser, door, read_rows

MINUTES = 9
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
TOY = "--device cpu --seconds 0 --heads 4 --kv_heads 2"
TOY_LAYER = f"{TOY} --head_dim 16 --block_size 16 --block_count 4 --window_size 20 --interleave"
TOY_BRANCHES = f"{TOY_LAYER} --no_variants"
TOY_MODEL = f"{TOY} --lengths 64 --hidden 64 --layers 1"
# Instead of a script: tests of the kernels, by themselves or under a sanitizer.
TEST, SANITIZE = "test", "sanitize"
TESTS = ("tests/test_kernel_branches.py", "tests/test_nsa_triton.py")

# In the order of their value: name, limit in seconds, script, its options (of tests the expression that chooses them),
# and the options in a dry run.
PARTS = (
    (
        "kernels are right", 180, TEST,
        "(large and 7B and bf16) or any_blocks or thousands or ties or bit_identical or in_chunks", "in_chunks",
    ),
    (
        "forward 64K", 60, "attention.py",
        "--lengths 64K --overlaps 0.8 0.9 --seconds 0.15 --interleave --no_variants",
        f"{TOY_BRANCHES} --lengths 64 --overlaps",
    ),
    (
        "forward 8K", 45, "attention.py",
        "--lengths 8K --overlaps 0.9 --seconds 0.15 --interleave --no_variants",
        f"{TOY_BRANCHES} --lengths 48 --overlaps",
    ),
    (
        "forward 128K", 90, "attention.py",
        "--lengths 128K --overlaps 0.9 --seconds 0.15 --interleave --no_variants",
        f"{TOY_BRANCHES} --lengths 80 --overlaps",
    ),
    (
        "backward 36K", 70, "attention.py",
        "--backward --lengths 36K --overlaps 0.9 --seconds 0.15 --no_variants",
        f"{TOY_BRANCHES} --lengths 128 --backward --overlaps 0.8",
    ),
    (
        "released and merged 64K", 45, "attention.py",
        "--lengths 64K --overlaps --seconds 0.15",
        f"{TOY_LAYER} --lengths 64 --heads 28 --kv_heads 4 --overlaps",
    ),
    (
        "prefill 32K", 60, "prefill.py",
        "--lengths 32K --new_tokens 8 --seconds 0", f"{TOY_MODEL} --new_tokens 1 --runs 1",
    ),
    (
        "train step 36K", 45, "train_step.py",
        "--lengths 36K --layers 4 --seconds 0", TOY_MODEL,
    ),
    (
        "prefill 128K", 110, "prefill.py",
        "--lengths 128K --new_tokens 8 --seconds 0 --runs 2", f"{TOY_MODEL} --new_tokens 1 --runs 1",
    ),
    (
        "kernels are right in other sizes", 120, TEST,
        "large and not (7B and bf16) and not thousands", None,
    ),
    (
        "kernels stay in bounds", 60, SANITIZE,
        "any_blocks_can_be_given", None,
    ),
    (
        "forward 32K", 45, "attention.py",
        "--lengths 32K --overlaps 0.5 0.9 --seconds 0.15 --interleave --no_variants",
        f"{TOY_BRANCHES} --lengths 32 --overlaps",
    ),
)  # fmt: skip


@door
def main() -> None:
    parser = OptionParser(__doc__)
    parser.add_argument("--resume", action="store_true", help="leave out what the last run finished")
    parser.add_argument("--dry_run", action="store_true", help="every part at a toy size, on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no part is begun (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (benchmarks/results)")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU; --dry_run shows on a CPU that every part works")
    if importlib.util.find_spec("pytest") is None:
        parser.error('there is no pytest for the kernels\' tests; pip install -e ".[test]" brings it')
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    path, log = args.output / "campaign.json", args.output / "campaign.txt"
    state = json.loads(path.read_text()) if args.resume and path.exists() else {}
    if not state:
        log.unlink(missing_ok=True)
    state.setdefault("date", datetime.now(UTC).isoformat(timespec="seconds"))
    done = state.setdefault("parts", {})
    for name, limit, program, options, toy in PARTS:
        if done.get(name, {}).get("result") == "finished":
            continue
        left = end - time.monotonic()
        command = command_of(program, toy if args.dry_run else options, state["date"], args.output)
        if command is None:
            done[name] = {"result": "skipped: no compute-sanitizer here, or a dry run"}
        elif left < 5:
            done[name] = {"result": "not begun: no time left"}
        else:
            done[name] = run(name, command, left if args.dry_run else min(limit, left), log)
        print(f"{name}: {done[name]['result']} ({done[name].get('seconds', 0)} s)", flush=True)
        path.write_text(json.dumps(state, indent=1) + "\n")
        (args.output / "campaign.md").write_text(report(state, args.output))
    print((args.output / "campaign.md").read_text())


def command_of(program: str, options: str | None, date: str, output: Path) -> list[str] | None:
    """Of a part; None if it cannot run here."""
    sanitizer = next(filter(None, map(shutil.which, SANITIZERS)), None)
    if options is None or (program == SANITIZE and sanitizer is None):
        return None
    if program in (TEST, SANITIZE):
        files = [str(ROOT / name) for name in TESTS]
        # A line for each test as it ends: the part may be ended before what pytest reports at last.
        tests = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *files, "-k", options]
        return tests if program == TEST else [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *tests]
    rows = ["--date", date, "--output", str(output)]
    return [sys.executable, str(ROOT / "benchmarks" / program), *options.split(), *rows]


def run(name: str, command: list[str], limit: float, log: Path) -> dict:
    """Run a part, at most `limit` seconds; its output is added to a file, as it comes."""
    start = time.monotonic()
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if "memcheck" in command:
        # To a sanitizer, all that the caching allocator holds is in bounds.
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("a") as file:
        print(f"\n# {name}\n$", *command, file=file, flush=True)
        options = {"stdout": file, "stderr": file, "env": variables, "cwd": ROOT, "start_new_session": True}
        with subprocess.Popen(command, **options) as process:
            try:
                code = process.wait(limit)
                result = "finished" if code == 0 else f"failed: exit code {code}"
            except subprocess.TimeoutExpired:
                result = f"stopped after {limit:.0f} s"
            finally:
                # With what it started itself, which would keep the GPU.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return {"result": result, "seconds": round(time.monotonic() - start, 1)}


def report(state: dict, folder: Path) -> str:
    """Parts and how they ended, then every figure of this run beside its prediction."""
    lines = [f"# Campaign of {state['date']}", "", "| part | result | s |", "|---|---|---|"]
    lines += [f"| {name} | {x['result']} | {x.get('seconds', '')} |" for name, x in state["parts"].items()]
    rows = [row for name in ("attention", "prefill", "train_step") for row in read_rows(folder / f"{name}.json")]
    rows = [row for row in rows if row["date"] == state["date"]]
    if rows:
        about = [rows[0].get(name) for name in ("hardware", "torch", "triton", "transformers", "commit")]
        lines += ["", ", ".join(f"{x}" for x in about if x is not None)]
    predicted = {(x["tokens"], x["pass"], x["part"]): x for x in read_rows(RESULTS / "predicted.json")}
    columns = ("what", "kernel", "tokens", "pass", "selection", "union", "L2", "ms", "predicted", "speedup", "peak MB")
    lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        ours = predicted.get((row["tokens"], row.get("pass"), row.get("part")))
        is_predicted = ours and row.get("kernel") == "triton" and row.get("selection") in (None, "overlap 0.9")
        guess = f"{ours['ms_low']}-{ours['ms_high']}" if is_predicted else None
        cells = (row.get("part", row["benchmark"]), row.get("model", row["kernel"]), row["tokens"], row.get("pass"),
                 row.get("selection"), row.get("union"), row.get("l2"), row.get("ms", row.get("skipped")), guess,
                 row.get("speedup"), row.get("peak_mb"))  # fmt: skip
        lines.append("| " + " | ".join("" if x is None else str(x) for x in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
