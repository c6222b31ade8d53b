"""What the benchmarks share: the checkout they measure, options, models and prompts, timing, and rows of results.

A row is one measured figure with everything needed to judge it: shape, kernel, selection, hardware, versions, clocks.
`attention.py`, `prefill.py`, `train_step.py` and `video.py` write them, `plot.py` draws them, README.md says how to
read them.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

# First: it names the extra of a package that is missing.
from lib import options  # noqa: E402
from lib.door import door  # noqa: E402, F401

# isort: split

import torch  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FRAME_PAIR = (1, 16, 16)  # grid of patches of two frames of 224 x 224, which become 64 tokens
TEXT_BEFORE = 16  # tokens before a video: the system prompt
SLOW = 0.1  # seconds from which on a call is run a few times only

# `videonsa` is the checkout that this file lies in, installed or not: import common before anything of it.
_spec = importlib.util.spec_from_file_location("videonsa", ROOT / "__init__.py")
sys.modules["videonsa"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["videonsa"])


class OptionParser(options.OptionParser):
    """The parser of the benchmarks, with the spellings of `lib/options.py`; the help of an option says its default."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_length(text: str) -> int:
    """Number of tokens: "131072" or "128K"."""
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


def add_options(parser) -> None:
    """The options of all scripts that run the attention which do not say what is measured."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure beyond its least runs (1)")
    add_output_options(parser)


def add_output_options(parser) -> None:
    """The options of all scripts."""
    parser.add_argument("--date", help="stored with every row, and tells runs apart (default: now, in UTC)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (benchmarks/results)")


# Sizes of a model that end on a CPU in seconds.
TOY = "--lengths 128 --layers 2 --hidden 64 --heads 4 --kv_heads 2 --seconds 0"


def add_model_options(parser, lengths: list[int]) -> None:
    """The options of prefill.py and train_step.py: their prompt, kernels and shape but for the number of layers."""
    parser.add_argument("--lengths", type=parse_length, nargs="+", default=lengths, help="vision tokens (8K ... 128K)")
    parser.add_argument("--question", type=int, default=32, help="text tokens after the video (%(default)s)")
    parser.add_argument("--attention", default="sdpa", help="what the stock model runs (%(default)s)")
    backend = "triton" if torch.cuda.is_available() else "torch"
    backends = {"default": backend, "choices": ("triton", "torch")}
    parser.add_argument("--nsa_backend", "--backend", **backends, help="kernels or PyTorch (%(default)s)")
    parser.add_argument("--nsa_variant", default="paper", choices=("paper", "merged"), help="(%(default)s)")
    for name, default in (("hidden", 3584), ("heads", 28), ("kv_heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")


def parse_model_options(parser, timed: bool = True):
    """The values of these options; `timed` says whether the model will run."""
    args = parser.parse_args()
    if timed and args.device == "cpu" and args.lengths == parser.get_default("lengths"):
        parser.exit(2, f"{parser.prog}: without a GPU, the 7B at these lengths does not end; try {TOY}\n")
    if any(tokens % 64 for tokens in args.lengths):
        parser.error("--lengths must be multiples of 64, the tokens of two frames")
    return args


def make_models(args, device: torch.device, layers: int, vocabulary: int = 152064) -> dict:
    """VideoNSA and stock Qwen2.5-VL with the same random weights, but for the gates that only the former has, and next
    to no vision tower."""
    # Here because readers.py, which measures what importing its readers takes, imports this file, too.
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from videonsa.configuration_videonsa import VideoNSAConfig
    from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

    quarter = args.hidden // args.heads // 8
    settings = {
        "text_config": {
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 37 // 7,  # 18,944 for 3,584
            "num_hidden_layers": layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "vocab_size": vocabulary,
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
            VideoNSAConfig(**settings, nsa_backend=args.nsa_backend, nsa_variant=args.nsa_variant),
            dtype=DTYPES[args.dtype],
            attn_implementation="sdpa",
        )
        stock = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**settings), dtype=DTYPES[args.dtype], attn_implementation=args.attention
        )
    missing = stock.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    assert not missing, missing
    return {"VideoNSA": model.eval(), "Qwen2.5-VL": stock.eval()}


def make_prompt(model, tokens: int, question: int) -> dict:
    """For a VideoNSA model: text, a video of `tokens` vision tokens, text, as embeddings [1, length, hidden], positions
    [3, 1, length] and types.

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


def environment(device: torch.device, date: str | None) -> dict:
    """Hardware, clocks as found, versions and commit: the same for all rows of a run."""
    found = {
        "date": date or datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _processor(),
        **{name: version(name) for name in ("torch", "triton", "transformers", "flash_attn", "flash_attn_3")},
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["hardware"] = properties.name
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        found |= _gpu_state(device, getattr(properties, "uuid", None))
    return found


def measure(fn, device: torch.device, seconds: float, least: int | None = None) -> dict:
    """Time of fn() in ms (median, 10th and 90th percentile) after warm-up, and its peak memory.

    Runs for about `seconds`, but at most 200 times and at least `least` (default: 10, or 3 if a run takes more than
    `SLOW`); on a GPU each run is timed by its own pair of events and finds an L2 cache that was overwritten. `peak_mb`
    counts what fn allocates, its result included, beyond what existed before; on a CPU it is None. Without memory for
    fn, the row says so instead.
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
        start, warm, spent = time.perf_counter(), 0, 0.0
        while spent < max(SLOW, seconds / 4) and (warm < 2 or spent < seconds / 4):
            fn()
            warm += 1
            if cuda:
                torch.cuda.synchronize(device)
            spent = time.perf_counter() - start
        estimate = spent / warm
        if least is None:
            least = 3 if estimate > SLOW else 10
        peak = round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1) if cuda else None
        times = (_event_times if cuda else _clock_times)(fn, device, max(least, min(200, int(seconds / estimate))))
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    return {**_figures(times), "peak_mb": peak}


def measure_in_turns(calls: dict, device: torch.device, seconds: float, cold: bool = True, least: int = 6) -> dict:
    """Times of calls that are to be compared, {name: figures as of `measure`, without memory}: one after another, then
    in reverse (A B B A), and again, so that clocks that drift favour none: at least `least` times each, or twice once
    they took 10 `SLOW` each. With `cold` each finds an L2 cache that was overwritten, otherwise what the same call left
    there in an untimed run just before."""
    cuda = device.type == "cuda"
    times, failed = {name: [] for name in calls}, {}
    start = time.perf_counter()
    for round_ in itertools.count():
        spent = (time.perf_counter() - start) / len(calls)
        if round_ > (1 if spent > 10 * SLOW else least // 2) and (spent > seconds or round_ > 100):
            break
        for name in (*calls, *reversed(calls)):
            if name not in failed:
                try:
                    if not cold or round_ == 0:
                        calls[name]()
                    timed = _event_times if cuda else _clock_times
                    times[name] += timed(calls[name], device, 1, *([cold] if cuda else []))
                except (RuntimeError, ImportError) as error:  # out of memory is one
                    failed[name] = {"skipped": str(error).split("\n")[0]}
    return {name: failed.get(name) or _figures(x[2:]) for name, x in times.items()}


def time_calls(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor, all threads together, of each call in each round. They run turn and turn about; a first
    round is not counted. Other work on the machine disturbs these times less than the clock's."""
    times = {name: [] for name in calls}
    for counted in [False] + [True] * rounds:
        for name, call in calls.items():
            start = time.process_time()
            call()
            if counted:
                times[name].append(time.process_time() - start)
    return times


def measure_on_cpu(calls: dict, rounds: int) -> dict:
    """Figures as of `measure`, {name: figures}, of the times of `time_calls`."""
    times = time_calls(calls, rounds)
    return {name: {**_figures([1e3 * x for x in own]), "peak_mb": None} for name, own in times.items()}


def announce(same: dict) -> None:
    """Print what all rows of a run have in common."""
    print(", ".join(f"{name} {value}" for name, value in same.items() if value is not None))


class Results:
    """Rows of one length in a JSON file, after those that it has. Each `write` replaces the last, so that a run that is
    ended leaves what it has measured, and rows of an earlier attempt of the same run."""

    names = ("date", "tokens", "part", "model", "kernel", "pass", "selection", "l2", "order", "layers")

    def __init__(self, path: Path, same: dict):
        self.path, self.same = path, same
        self.before = read_rows(path)

    def write(self, rows: list[dict]) -> None:
        rows = [{**self.same, **row} for row in rows]
        replaced = {self._key(row) for row in rows}
        _write_rows(self.path, [*(row for row in self.before if self._key(row) not in replaced), *rows])

    def _key(self, row: dict) -> tuple:
        return tuple(row.get(name) for name in self.names)


def report_models(results: Results, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Print and keep the rows of VideoNSA and the stock model, in this order, with the speedup of the former."""
    if all("ms" in row for row in rows):
        rows[0]["speedup"] = round(rows[1]["ms"] / rows[0]["ms"], 3)
    print()
    print_table((*columns, "speedup", "skipped"), rows)
    results.write(rows)


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to a JSON list in a file, one row per line."""
    _write_rows(path, [*read_rows(path), *rows])


def read_rows(path: Path) -> list[dict]:
    """Those of a file; none if it is missing."""
    return json.loads(path.read_text()) if path.exists() else []


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step: a run may be ended at any time.
    new = path.with_name(f"{path.name}.new")
    new.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    new.replace(path)


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


def _figures(times: list[float]) -> dict:
    times = sorted(times)
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    figures = {"ms": statistics.median(times), "ms_low": low, "ms_high": high}
    return {**{name: round(x, 4) for name, x in figures.items()}, "runs": len(times)}


def _event_times(fn, device, runs, cold=True) -> list[float]:
    other = torch.empty(2**28, dtype=torch.uint8, device=device)  # several times the L2 cache
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        if cold:
            other.zero_()
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


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
