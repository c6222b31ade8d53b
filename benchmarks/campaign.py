"""All GPU figures of this repository by one command, the most valuable first, in under ten minutes.

    python benchmarks/campaign.py                           # any GPU from sm_80 on; no network
    python benchmarks/campaign.py --resume                  # goes on where a run was cut short
    python benchmarks/campaign.py --dry_run                 # anywhere: every part at a toy size

Each part runs in a process of its own with a time limit. After each, what it found is in the folder of results: its
rows in the JSON files of the scripts, its output in `campaign/`, and in `campaign.md` a table that sets each figure
beside what `compile_kernels.py` predicted (`predicted.json`).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import RESULTS, ROOT, OptionParser, door

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
        "kernels are right", 110, TEST,
        "large and 7B or any_blocks or thousands or ties or bit_identical or in_chunks", "in_chunks",
    ),
    (
        "forward 64K", 60, "attention.py",
        "--lengths 64K --overlaps 0.8 0.9 --seconds 0.15 --interleave --no_variants",
        f"{TOY_BRANCHES} --lengths 64 --overlaps",
    ),
    (
        "forward 8K and 128K", 90, "attention.py",
        "--lengths 8K 128K --overlaps 0.9 --seconds 0.15 --interleave --no_variants",
        f"{TOY_BRANCHES} --lengths 48 80 --overlaps",
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
        "--lengths 128K --new_tokens 8 --seconds 0 --runs 3", f"{TOY_MODEL} --new_tokens 1 --runs 1",
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
    folder = args.output / "campaign"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "parts.json"
    state = json.loads(path.read_text()) if args.resume and path.exists() else {}
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
            done[name] = run(name, command, left if args.dry_run else min(limit, left), folder)
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
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", options]
        return tests if program == TEST else [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *tests]
    rows = ["--date", date, "--output", str(output)]
    return [sys.executable, str(ROOT / "benchmarks" / program), *options.split(), *rows]


def run(name: str, command: list[str], limit: float, folder: Path) -> dict:
    """Run a part, at most `limit` seconds; its output goes to a file, as it comes."""
    start = time.monotonic()
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with open(folder / f"{name.replace(' ', '-')}.txt", "w") as log:
        print("$", *command, file=log, flush=True)
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=limit, env=inherited, cwd=ROOT).returncode
            result = "finished" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s"
    return {"result": result, "seconds": round(time.monotonic() - start, 1)}


def report(state: dict, folder: Path) -> str:
    """Parts and how they ended, then every figure of this run beside its prediction."""
    lines = [f"# Campaign of {state['date']}", "", "| part | result | s |", "|---|---|---|"]
    lines += [f"| {name} | {x['result']} | {x.get('seconds', '')} |" for name, x in state["parts"].items()]
    rows = [row for name in ("attention", "prefill", "train_step") for row in read(folder / f"{name}.json")]
    rows = [row for row in rows if row["date"] == state["date"]]
    if rows:
        about = [rows[0].get(name) for name in ("hardware", "torch", "triton", "transformers", "commit")]
        lines += ["", ", ".join(f"{x}" for x in about if x is not None)]
    predicted = {(x["tokens"], x["pass"], x["part"]): x for x in read(RESULTS / "predicted.json")}
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


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


if __name__ == "__main__":
    main()
