"""Draw the results of the benchmarks: one PNG for each JSON file, of its latest run.

    python benchmarks/plot.py                               # results/*.json -> results/*.png
    python benchmarks/plot.py --input my/results --date 2026-01-31

Needs matplotlib. Nothing is computed here beyond what the rows say; README.md says what they mean.
"""

from common import door  # first: it names the extra of a package that is missing

# isort: split

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"


@door
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=RESULTS, help="folder of the JSON files (benchmarks/results)")
    parser.add_argument("--output", type=Path, help="folder of the PNGs (that of the JSON files)")
    parser.add_argument("--date", help="of the run to draw (the latest)")
    args = parser.parse_args()
    output = args.output or args.input
    output.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, draw in DRAWINGS.items():
        path = args.input / f"{name}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())
        date = args.date or max(row["date"] for row in rows)
        rows = [row for row in rows if row["date"] == date and "ms" in row]
        if not rows:
            raise ValueError(f"no figures of {date} in {path}")
        figure = draw(rows)
        shown = ("hardware", "power_limit_w", "sm_clock_mhz", "threads", "torch", "triton", "commit", "date")
        about = ", ".join(f"{key} {rows[0][key]}" for key in shown if rows[0].get(key) is not None)
        figure.suptitle(f"{name}: {about}", fontsize=8)
        figure.savefig(output / f"{name}.png", dpi=150)
        print(output / f"{name}.png")
        drawn += 1
    if not drawn:
        raise ValueError(f"none of {', '.join(f'{name}.json' for name in DRAWINGS)} in {args.input}")


def draw_attention(rows: list[dict]):
    """For each pass: dense kernels and the whole, the branches at random selections, and what overlap is worth."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    size = {"figsize": (18, 6 * len(passes)), "layout": "constrained"}
    figure, axes = plt.subplots(len(passes), 3, squeeze=False, **size)
    for name, (whole, branch, overlap) in zip(passes, axes, strict=True):
        # Rows measured in turns say again what others say.
        measured = [row for row in rows if row["pass"] == name and "l2" not in row]
        for part, style in (("dense", "--"), ("whole", "-")):
            chosen = (row for row in measured if row["part"] == part)
            lines(whole, chosen, ("part", "kernel", "selection"), "tokens", "ms", style)
        chosen = (row for row in measured if row["part"] != "dense" and row.get("selection", "random") == "random")
        lines(branch, chosen, ("part", "kernel"), "tokens", "ms")
        chosen = (row for row in measured if row["part"] == "selected" and row["overlap"] is not None)
        lines(overlap, chosen, ("tokens", "kernel"), "overlap", "ms")
        label(whole, f"whole layer and dense attention, {name}", "tokens", "ms")
        label(branch, f"branches, random selections, {name}", "tokens", "ms")
        title = f"selected attention, {name}"
        label(overlap, title, "overlap of neighbours' blocks (Jaccard, measured)", "ms", by_length=False)
    return figure


def draw_prefill(rows: list[dict]):
    """Time to first token, memory, decoding."""
    figure, axes = plt.subplots(1, 3, figsize=(18, 6), layout="constrained")
    for axis, value, title in (
        (axes[0], "ms", "time to first token"),
        (axes[1], "peak_mb", "peak memory of the prefill beyond the weights"),
        (axes[2], "decode_tokens_per_s", "decoding"),
    ):
        measured = (row for row in rows if row.get(value) is not None)
        lines(axis, measured, ("model", "kernel"), "tokens", value)
        label(axis, title, "vision tokens", {"peak_mb": "MB", "ms": "ms"}.get(value, "tokens/s"))
    return figure


def draw_train_step(rows: list[dict]):
    """Time of a layer, memory, and how many layers there were."""
    figure, axes = plt.subplots(1, 3, figsize=(18, 6), layout="constrained")
    for axis, value, title, unit in (
        (axes[0], "ms_per_layer", "time of a step, per layer", "ms"),
        (axes[1], "peak_mb", "peak memory beyond weights and optimizer, of all layers", "MB"),
        (axes[2], "layers", "layers", "number"),
    ):
        measured = (row for row in rows if row[value] is not None)
        lines(axis, measured, ("model", "kernel", "activations"), "tokens", value)
        label(axis, title, "vision tokens", unit)
    return figure


def draw_video(rows: list[dict]):
    """Time with its range, and peak memory, of all readers of each clip."""
    clips = {}
    for row in rows:
        name = "{codec} {height}p, {minutes:g} min, key frame every {key_frames} s, at {fps:g} fps".format(**row)
        clips.setdefault(name, []).append(row)
    size = {"figsize": (14, 1 + 3 * len(clips)), "layout": "constrained"}
    figure, axes = plt.subplots(len(clips), 2, squeeze=False, **size)
    for (time, memory), (name, read) in zip(axes, clips.items(), strict=True):
        readers = [f"{row['reader']} ({row['output']})" for row in read]
        seconds, low, high = ([row[field] / 1e3 for row in read] for field in ("ms", "ms_low", "ms_high"))
        time.barh(readers, seconds, xerr=[np.subtract(seconds, low), np.subtract(high, seconds)])
        time.set(title=name, xlabel="s")
        memory.barh(readers, [row["peak_mb"] for row in read], color="C1")
        memory.set(title="peak memory", xlabel="MB")
        memory.tick_params(labelleft=False)
        for axis in (time, memory):
            axis.invert_yaxis()
            axis.grid(True, axis="x", alpha=0.3)
    return figure


def lines(axis, rows, keys: tuple[str, ...], x: str, y: str, style: str = "-") -> None:
    """One line for each combination of values that the rows have under the keys."""
    groups = {}
    for row in rows:
        name = " ".join(str(row[key]) for key in keys if row.get(key) is not None)
        groups.setdefault(name, []).append((row[x], row[y]))
    for name, points in groups.items():
        axis.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=4, label=name)


def label(axis, title: str, x: str, y: str, by_length: bool = True) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    if by_length:
        lengths = sorted({tokens for line in axis.lines for tokens in line.get_xdata()})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    if y in ("tokens/s", "number"):
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
    axis.grid(True, which="both", alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


DRAWINGS = {"attention": draw_attention, "prefill": draw_prefill, "train_step": draw_train_step, "video": draw_video}

if __name__ == "__main__":
    main()
