"""What the benchmarks share: the checkout they measure, command-line options, timing, and rows of results.

A row is one measured figure with everything needed to judge it: shape, kernel, selection, hardware, versions, clocks.
`attention.py`, `prefill.py` and `video.py` write them, `plot.py` draws them, README.md says how to read them.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# `videonsa` is the checkout that this file lies in, installed or not: import common before anything of it.
_spec = importlib.machinery.ModuleSpec("videonsa", None, is_package=True)
_spec.submodule_search_locations = [str(ROOT)]
sys.modules["videonsa"] = importlib.util.module_from_spec(_spec)


def parse_length(text: str) -> int:
    """Number of tokens: "131072" or "128K"."""
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


def add_options(parser) -> None:
    """The options of attention.py and prefill.py that do not say what is measured."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure beyond its least runs (1)")
    add_output_options(parser)


def add_output_options(parser) -> None:
    """The options of all scripts."""
    parser.add_argument("--date", help="stored with every row, and tells runs apart (default: now, in UTC)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (benchmarks/results)")


def environment(device: torch.device, date: str | None) -> dict:
    """Hardware, clocks as found, versions and commit: the same for all rows of a run."""
    found = {
        "date": date or datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _processor(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "flash_attn", "flash_attn_3")},
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["hardware"] = properties.name
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        found |= _gpu_state(device, getattr(properties, "uuid", None))
    return found


def measure(fn, device: torch.device, seconds: float, least: int = 10) -> dict:
    """Time of fn() in ms (median, 10th and 90th percentile) after warm-up, and its peak memory.

    Runs for about `seconds`, but at least `least` and at most 200 times; on a GPU each run is timed by its own pair of
    events and finds an L2 cache that was overwritten. `peak_mb` counts what fn allocates, its result included, beyond
    what existed before; on a CPU it is None. Without memory for fn, the row says so instead.
    """
    cuda = device.type == "cuda"
    try:
        if cuda:
            torch.cuda.empty_cache()
        fn()  # compiles
        if cuda:
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        start, warm = time.perf_counter(), 0
        while warm < 2 or time.perf_counter() - start < seconds / 4:
            fn()
            warm += 1
            if cuda:
                torch.cuda.synchronize(device)
        estimate = (time.perf_counter() - start) / warm
        peak = round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1) if cuda else None
        times = (_event_times if cuda else _clock_times)(fn, device, max(least, min(200, int(seconds / estimate))))
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    times.sort()
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    figures = {"ms": statistics.median(times), "ms_low": low, "ms_high": high}
    return {**{name: round(x, 4) for name, x in figures.items()}, "runs": len(times), "peak_mb": peak}


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to a JSON list in a file, one row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [*(json.loads(path.read_text()) if path.exists() else []), *rows]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def print_table(columns: tuple[str, ...], rows: list[dict]) -> None:
    """Those columns of the rows, as wide as they need; numbers to the right."""
    table = [columns]
    for row in rows:
        values = (row.get(column) for column in columns)
        table.append(["" if x is None else f"{x:,.3f}" if isinstance(x, float) else str(x) for x in values])
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    for line in table:
        cells = (x.rjust(w) if right else x.ljust(w) for x, w, right in zip(line, widths, numeric, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.exists() else []
    model = models[0].partition(": ")[2] if models else platform.machine()
    return f"CPU ({model}, {os.cpu_count()} cores)"


def _event_times(fn, device, runs) -> list[float]:
    cold = torch.empty(2**28, dtype=torch.uint8, device=device)  # several times the L2 cache
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        cold.zero_()
        start.record()
        fn()
        stop.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) for start, stop in events]


def _clock_times(fn, device, runs) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _gpu_state(device, uuid) -> dict:
    """Driver, power limit, and the clocks that the GPU settles on by itself while it multiplies matrices."""
    names = ("driver", "power_limit_w", "sm_clock_mhz", "sm_clock_max_mhz", "memory_clock_mhz", "temperature_c")
    query = "driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    command += [f"--id=GPU-{uuid}"] if uuid else []
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    for _ in range(500):
        x @ x
    values = [x.strip() for x in _output(command).split("\n")[0].split(",")]
    torch.cuda.synchronize(device)
    if len(values) != len(names):
        return {}  # no nvidia-smi
    numbers = [float(x) if x.replace(".", "", 1).isdigit() else None for x in values[1:]]
    return dict(zip(names, [values[0], *numbers], strict=True))


def _commit() -> str | None:
    """Short hash of the checkout, with a + where tracked files differ from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{commit}{'+' if changed else ''}" if commit else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
