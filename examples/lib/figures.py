"""Draws what `analyze.py` measured: a figure for each finding, and for one answer a contact sheet and a video.

Every function takes the content of FINDING.json; `draw` chooses by its name.
"""

import textwrap
from pathlib import Path

import av
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.transforms import ScaledTranslation, Transform
from PIL import Image, ImageDraw

from .times import clock

COLOURS = {
    "compression": "#0072b2",
    "selection": "#d55e00",
    "window": "#009e73",
    "gated": "#000000",
    "dense": "#999999",
    "pooling": "#56b4e9",
    "choice": "#e69f00",
    "gates": "#cc79a7",
    "whole": "#000000",
}
PLAIN = ("#0072b2", "#d55e00", "#999999", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 100,
}
DIMMED = 0.65  # light of a patch that has no score, in the highlighted video
TILE = 224  # pixels of a frame in the highlighted video, at least


def draw(result: dict, folder: Path) -> Path:
    """Write FINDING.png to `folder`."""
    with plt.rc_context(STYLE):
        figure = DRAWN[result["finding"]](result)
        path = folder / f"{result['finding']}.png"
        save(figure, path)
    return path


def transfer(result):
    runs = result["accuracy"]
    kinds = [*sorted(set(next(iter(runs.values()))) - {"all"}), "all"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 1))
    grouped_bars(left, {name: [100 * run[k]["all"]["accuracy"] for k in kinds] for name, run in runs.items()}, kinds)
    questions = next(iter(runs.values()))["all"]["all"]["questions"]
    left.set(title=f"Accuracy by attention, {questions} questions", ylabel="exact match (%)", ylim=(0, 108))
    names = list(result["agreement"])
    table = np.array([[100 * result["agreement"][a][b] for b in names] for a in names], dtype=float)
    heat_map(right, table, names, names, "{:.0f}", vmin=0, vmax=100)
    right.set_title("Same answer (% of questions)")
    return figure


def scaling(result):
    cells = result["cells"]
    frames, tokens = (sorted({cell[name] for cell in cells}) for name in ("frames", "frame_tokens"))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(1.1, 1, 1.5))
    lengths = sorted(result["by_length"], key=int)
    rows = [result["by_length"][length] for length in lengths]
    x = [row["tokens"] for row in rows]
    for i, kind in enumerate(sorted({kind for row in rows for kind in row["types"]})):
        # Later lines are thinner, so that those below them show.
        look = {"color": PLAIN[i], "label": kind, "lw": 4 / (i + 1), "ms": 11 / (i + 1) ** 0.5}
        axes[0].plot(x, [100 * row["types"].get(kind, np.nan) for row in rows], "o-", **look)
    axes[0].set(
        title="Accuracy by context length", xlabel="tokens of the prompt", ylabel="exact match (%)", ylim=(0, 105)
    )
    legend_below(axes[0], columns=4)
    axes[1].plot(x, [row["seconds"] for row in rows], "o-", color="black")
    axes[1].set(
        title="Time by context length", xlabel="tokens of the prompt", ylabel="seconds per question", yscale="log"
    )
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{n:,.0f}" for n in x])
        axis.minorticks_off()
    table = np.full((len(tokens), len(frames)), np.nan)
    for cell in cells:
        if cell["questions"]:
            table[tokens.index(cell["frame_tokens"]), frames.index(cell["frames"])] = 100 * cell["accuracy"]
    heat_map(axes[2], table, tokens, frames, "{:.0f}", cmap="viridis", origin="lower")
    for contexts in sorted({cell["context"] for cell in cells}):
        line = sorted(
            (frames.index(c["frames"]), tokens.index(c["frame_tokens"])) for c in cells if c["context"] == contexts
        )
        if len(line) > 1:
            axes[2].plot(*zip(*line, strict=True), color="white", lw=1.2, ls="--")
    for i, best in enumerate(result["best_splits"]):
        at = frames.index(best["frames"]), tokens.index(best["frame_tokens"])
        label = "best of its context" if i == 0 else None
        axes[2].plot(*at, "s", ms=34, mfc="none", mec="#e69f00", mew=2.5, label=label)
    axes[2].set(title="Accuracy (%) by how the context is spent", xlabel="frames", ylabel="tokens per 2 frames")
    handle = plt.Line2D([], [], marker="s", ms=10, mfc="none", mec="#e69f00", mew=2.5, ls="")
    dashed = plt.Line2D([], [], color="black", ls="--")
    legend_below(axes[2], columns=2, handles=[handle, dashed], labels=["best of its context", "same context"])
    return figure


def budget(result):
    cells = [cell for cell in result["cells"] if cell["questions"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    trained = next(cell for cell in cells if cell["trained"])
    x = np.array([cell["window_size"] for cell in cells])
    y = np.array([cell["block_count"] for cell in cells])
    values = np.array([100 * cell["accuracy"] for cell in cells])
    steps = [
        round(2 * np.log2(cell["keys"] / trained["keys"])) for cell in cells
    ]  # whole blocks miss a budget a little
    for step in set(steps):
        line = sorted((x[i], y[i]) for i in range(len(cells)) if steps[i] == step)
        if len(line) > 1:
            left.plot(*zip(*line, strict=True), color="0.7", lw=1, zorder=0)
    points = left.scatter(x, y, c=values, s=130, cmap="viridis", edgecolors="0.3")
    left.plot(trained["window_size"], trained["block_count"], "*", ms=11, mfc="white", mec="black", label="trained")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    for axis, numbers in ((left.xaxis, x), (left.yaxis, y)):
        ticks = [2**i for i in range(int(np.log2(numbers.min())), int(np.log2(numbers.max())) + 2)]
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
    left.set(title="Accuracy by allocation; lines: equal budget", xlabel="window_size (tokens)", ylabel="block_count")
    legend_below(left)
    figure.colorbar(points, ax=left, label="exact match (%)")
    right.axhline(100 * trained["accuracy"], color="0.8", lw=1)
    shares = [100 * cell["share"] for cell in cells]
    ratio = [cell["window_size"] / cell["keys"] for cell in cells]
    points = right.scatter(shares, values, c=ratio, s=70, cmap="plasma", vmin=0, vmax=1, edgecolors="0.3")
    right.plot(100 * trained["share"], 100 * trained["accuracy"], "*", ms=11, mfc="white", mec="black", label="trained")
    right.set(
        title="Accuracy by share of attention", xlabel="computed pairs (% of dense attention)", ylabel="exact match (%)"
    )
    legend_below(right)
    figure.colorbar(points, ax=right, label="share of the budget in the window")
    return figure


def gates(result):
    branches, layers = result["branches"], np.arange(len(result["mean"]))
    figure = plt.figure(figsize=(13, 7.8))
    top, bottom = figure.subfigures(2, 1)
    depth, alike, time = top.subplots(1, 3)
    mean, spread = np.array(result["mean"]), np.array(result["quartiles_over_heads"])  # [layers, 2, branches]
    step = 0.75 / len(branches)
    for b, name in enumerate(branches):
        look, x = {"color": COLOURS[name], "label": name}, layers + (b - (len(branches) - 1) / 2) * step
        depth.bar(x, spread[:, 1, b] - spread[:, 0, b], 0.88 * step, spread[:, 0, b], color=COLOURS[name], alpha=0.35)
        depth.plot(x, mean[:, b], "_", ms=max(3, 64 / len(layers)), mew=3, **look)
        if result["mean_similarity"]:
            alike.plot(layers, np.array(result["mean_similarity"])[:, b], "o-", **look)
        time.plot((np.arange(10) + 0.5) / 10, np.array(result["by_time"]).mean(0)[:, b], "o-", **look)
    depth.set(title="Gates over depth; bars: quartiles over heads", xlabel="layer", ylabel="gate", ylim=(0, 1))
    alike.set(title="Inter-head similarity", xlabel="layer", ylabel="mean correlation of two heads", ylim=(-1, 1))
    time.set(
        title="Gates over the video, mean of all layers",
        xlabel="relative time of the frame",
        ylabel="gate",
        ylim=(0, 1),
    )
    ticks = layers if len(layers) < 12 else layers[::4]
    for axis in (depth, alike):
        axis.set_xticks(ticks)
    for axis in (depth, alike, time):
        legend_below(axis, columns=len(branches))
    each, ablation = bottom.subplots(1, 2, width_ratios=(1, 1.5))
    heads = np.array(result["by_head"])  # [layers, heads, branches]
    count = heads.shape[1]
    image = each.imshow(
        np.concatenate(list(heads.transpose(2, 0, 1)), 1), aspect="auto", cmap="viridis", vmin=0, vmax=1
    )
    each.set_xticks([count * (b + 0.5) - 0.5 for b in range(len(branches))], branches)
    for b in range(1, len(branches)):
        each.axvline(count * b - 0.5, color="white", lw=2)
    each.set_yticks(ticks)
    each.set(title="Mean gate of each head (columns)", ylabel="layer")
    bottom.colorbar(image, ax=each, label="gate")
    rows = result["ablation"]
    kinds = [*sorted(set(next(iter(rows.values()))) - {"all"}), "all"]
    table = np.array([[100 * row[kind]["all"]["accuracy"] for kind in kinds] for row in rows.values()])
    short = [name.replace("compression", "comp.").replace("selection", "sel.") for name in rows]
    heat_map(ablation, table, short, kinds, "{:.0f}", cmap="viridis", vmin=0, vmax=100)
    questions = next(iter(rows.values()))["all"]["all"]["questions"]
    ablation.set_title(f"Accuracy (%) with only these branches, {questions} questions")
    return figure


def latency(result):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
    rows = [row for row in result["rows"] if "ms" in row]
    tokens = sorted({row["tokens"] for row in rows})
    times = {part: {r["tokens"]: r["ms"] for r in rows if r["part"] == part} for part in result["growth"]}
    for part, values in times.items():
        x = [n for n in tokens if n in values]
        left.plot(x, [values[n] for n in x], "o-", color=COLOURS[part], label=part, lw=2 if part == "whole" else 1.5)
        expected = [values[x[-1]] * (n / x[-1]) ** result["growth"][part] for n in x]
        left.plot(x, expected, ":", color=COLOURS[part], lw=1)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(tokens, [f"{n // 1024}K" if n >= 1024 else str(n) for n in tokens])
    left.set(
        title="Time of one layer; dotted: theory, from the last point", xlabel="vision tokens", ylabel="milliseconds"
    )
    legend_below(left, columns=4)
    parts = [part for part in ("compression", "choice", "selection", "window", "gates") if part in times]
    total = [sum(times[part].get(n, 0) for part in parts) for n in tokens]
    bottom = np.zeros(len(tokens))
    for part in parts:
        share = np.array([100 * times[part].get(n, 0) / t for n, t in zip(tokens, total, strict=True)])
        right.bar(np.arange(len(tokens)), share, 0.8, bottom, color=COLOURS[part], label=part)
        bottom += share
    right.set_xticks(np.arange(len(tokens)), [f"{n // 1024}K" if n >= 1024 else str(n) for n in tokens])
    right.set(title="Share of each part", xlabel="vision tokens", ylabel="% of their sum")
    legend_below(right, columns=len(parts))
    return figure


def sinks(result):
    branches = result["branches"]
    figure = plt.figure(figsize=(15, 7.2))
    top, bottom = figure.subfigures(2, 1)
    scatters = top.subplots(1, len(branches))
    for axis, (name, found) in zip(scatters, branches.items(), strict=True):
        points = np.array([point for layer in found["points"] for point in layer])
        order = points[:, 2].argsort()
        shown = axis.scatter(
            points[order, 1], points[order, 0], c=np.clip(points[order, 2], 1e-4, 1), s=14, cmap="viridis",
            norm=matplotlib.colors.LogNorm(1e-4, 1),
        )  # fmt: skip
        marked = points[points[:, 3] > 0]
        axis.scatter(marked[:, 1], marked[:, 0], s=60, facecolors="none", edgecolors="#d6278a", linewidths=1.8)
        axis.set(
            title=f"{name}\nsinks {found['share']:.2%}, α > 0.1 {found['attention_only']:.2%}", xlabel="value norm"
        )
    scatters[0].set_ylabel("key norm")
    top.colorbar(shown, ax=scatters[-1], label="attention received, α")
    depth, position, settings = bottom.subplots(1, 3, width_ratios=(1.6, 1.6, 1))
    for name, found in branches.items():
        layers = np.arange(len(found["by_layer"]))
        depth.plot(layers, 100 * np.array(found["by_layer"]), "o-", color=COLOURS[name], label=name)
        depth.plot(layers, 100 * np.array(found["by_layer_attention_only"]), ":", color=COLOURS[name])
        x = (np.arange(len(found["positions"])) + 0.5) / len(found["positions"])
        position.plot(x, 100 * np.array(found["positions"]), color=COLOURS[name], label=name)
        position.plot(x, 100 * np.array(found["positions_attention_only"]), ":", color=COLOURS[name])
    depth.set_xticks(layers if len(layers) < 12 else layers[::4])
    depth.set(title="Over depth (dotted: α > 0.1 alone)", xlabel="layer", ylabel="sinks (% of keys)")
    position.set(
        title="Over the stream (dotted: α > 0.1 alone)", xlabel="relative position", ylabel="sinks (% of keys)"
    )
    legend_below(depth, columns=len(branches))
    for axis in (depth, position):
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_ylim(bottom=0)
    rows = result["by_setting"]
    names = [f"{row['branch'][:3]}. " + setting_name(row) for row in rows]
    y = np.arange(len(rows))[::-1]
    settings.barh(y + 0.2, [100 * row["share"] for row in rows], 0.4, color=[COLOURS[row["branch"]] for row in rows])
    settings.barh(
        y - 0.2, [100 * row["attention_only"] for row in rows], 0.4,
        color=[COLOURS[row["branch"]] for row in rows], alpha=0.35,
    )  # fmt: skip
    settings.set_yticks(y, names, fontsize=9)
    settings.set(title="By block and window size\n(pale: α > 0.1 alone)", xlabel="% of keys")
    return figure


def needles(result):
    cells = result["cells"]
    frames, depths = (sorted({cell[name] for cell in cells}) for name in ("frames", "depth"))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    for axis, part, kinds in zip(axes, ("what", "when"), ("colour, shape and where", "when"), strict=True):
        table = np.full((len(depths), len(frames)), np.nan)
        for cell in cells:
            if cell[part]["questions"]:
                table[depths.index(cell["depth"]), frames.index(cell["frames"])] = 100 * cell[part]["accuracy"]
        labels = [f"{depth:.0%}" for depth in depths], [f"{n:,}" for n in frames]
        heat_map(axis, table, *labels, "{:.0f}", cmap="viridis", vmin=0, vmax=100)
        questions = sum(cell[part]["questions"] for cell in cells)
        axis.set(title=f"Accuracy (%): {kinds}, {questions} questions", xlabel="frames", ylabel="depth of the needle")
    return figure


def setting_name(row) -> str:
    return f"w {row['window_size']}" if "window_size" in row else f"{row['block_count']} × {row['block_size']}"


DRAWN = {
    "transfer": transfer,
    "scaling": scaling,
    "budget": budget,
    "gates": gates,
    "latency": latency,
    "sinks": sinks,
    "needles": needles,
}


def contact_sheet(result: dict, frames: np.ndarray, path: Path, columns: int = 6) -> None:
    """Per group of layers, and for the answer, the frames uint8 [T, height, width, 3] that score highest, in the order
    of the video, with their times; below, all scores over time."""
    groups = result["frames"]
    shown = min(columns, len(frames))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(1.75 * shown + 1.2, 1.9 * len(groups) + 3.2))
        grid = figure.add_gridspec(len(groups) + 1, shown, height_ratios=[1] * len(groups) + [1.1])
        for row, (name, scores) in enumerate(groups.items()):
            best = sorted(np.argsort(scores, kind="stable")[::-1][:shown])
            for column, i in enumerate(best):
                axis = figure.add_subplot(grid[row, column])
                axis.imshow(frames[i])
                axis.set_xticks([])
                axis.set_yticks([])
                axis.set_xlabel(f"{clock(result['seconds'][i])}\n{label_of(name, scores[i])}", fontsize=9)
                if column == 0:
                    axis.set_ylabel(row_title(name, result), fontsize=9)
        axis = figure.add_subplot(grid[-1, :])
        for i, (name, scores) in enumerate(groups.items()):
            top = max(scores) or 1
            axis.plot(
                result["seconds"], np.array(scores) / top, color=PLAIN[i], label=name.replace("answer", "attended")
            )
        axis.set(xlabel="seconds", ylabel="share of the highest", title="Over the whole video", ylim=(0, 1.05))
        legend_below(axis, columns=len(groups))
        wrapped = textwrap.fill(f"{result['question']}  →  {result['answer']}", 90)
        figure.suptitle(wrapped, fontsize=12, fontweight="bold")
        save(figure, path)


def row_title(name: str, result: dict) -> str:
    if name == "answer":
        return "attended by\nthe answer"
    layers = result["layers"][name]
    numbers = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"
    return f"chosen most,\n{numbers}"


def label_of(name: str, score: float) -> str:
    return f"α {score:.2g}" if name == "answer" else f"{score:.0%}"


def highlight_video(frames: np.ndarray, scores: dict[str, torch.Tensor], seconds, fps: float, path: Path) -> None:
    """An mp4 of frames uint8 [T, height, width, 3] side by side for each of the scores [T, rows, columns]: the higher a
    token's score against the highest of the video, the more colour and light has its patch. A patch of score 0 is grey,
    and light enough to see what it shows."""
    t, height, width, _ = frames.shape
    scale = max(1, -(-TILE // max(height, width)))
    size = (width * scale // 2 * 2, height * scale // 2 * 2)
    bar = 20
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=max(1, round(fps)))
        stream.width, stream.height = size[0] * len(scores), size[1] + bar
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "26"}
        for i in range(t):
            sheet = Image.new("RGB", (stream.width, stream.height))
            for column, (name, score) in enumerate(scores.items()):
                picture = lit(frames[i], (score[i].float() / score.max().clamp(min=1e-12)).numpy())
                sheet.paste(Image.fromarray(picture).resize(size, Image.NEAREST), (column * size[0], bar))
                text = f"{clock(float(seconds[i]))}  {name}"
                ImageDraw.Draw(sheet).text((column * size[0] + 4, 4), text, fill=(255, 255, 255))
            container.mux(stream.encode(av.VideoFrame.from_image(sheet)))
        container.mux(stream.encode())


def lit(frame: np.ndarray, score: np.ndarray) -> np.ndarray:
    """A frame uint8 [height, width, 3] whose patches have as much colour and light as their scores [rows, columns], of
    0 to 1, say. The root tells low scores, which most are, from none."""
    patch = frame.shape[0] // score.shape[0], frame.shape[1] // score.shape[1]
    light = np.kron(np.sqrt(score), np.ones(patch))[..., None]
    grey = DIMMED * frame.mean(-1, keepdims=True)
    return (light * frame + (1 - light) * grey).round().astype(np.uint8)


def save(figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def legend_below(axis, columns: int = 1, **what) -> None:
    """A legend under the label of the x axis, where it hides nothing."""
    place = {"loc": "upper center", "borderaxespad": 0, "bbox_transform": below(axis), "bbox_to_anchor": (0.5, 0)}
    axis.legend(**what, **place, ncol=columns, frameon=False, fontsize=9, columnspacing=1.2)


def below(axis) -> Transform:
    """Places across an axis, 46 points below it."""
    return axis.transAxes + ScaledTranslation(0, -46 / 72, axis.figure.dpi_scale_trans)


def grouped_bars(axis, groups: dict[str, list[float]], labels) -> None:
    width = 0.8 / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        x = np.arange(len(labels)) + (i - (len(groups) - 1) / 2) * width
        bars = axis.bar(x, values, width * 0.94, color=PLAIN[i], label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(np.arange(len(labels)), labels)
    legend_below(axis, columns=len(groups))


def heat_map(axis, table: np.ndarray, rows, columns, form: str, cmap="Blues", **kwargs) -> None:
    """A table [rows, columns] as colours with the numbers in them."""
    image = axis.imshow(table, cmap=cmap, aspect="auto", **kwargs)
    axis.set_xticks(np.arange(len(columns)), [textwrap.fill(str(c), 10) for c in columns])
    axis.set_yticks(np.arange(len(rows)), [textwrap.fill(str(r), 22) for r in rows])
    for i, j in np.ndindex(table.shape):
        if not np.isnan(table[i, j]):
            red, green, blue, _ = image.cmap(image.norm(table[i, j]))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            # A box in the colour of its cell interrupts a line that runs through it.
            box = {"boxstyle": "square,pad=0.15", "facecolor": (red, green, blue), "edgecolor": "none"}
            colour = "white" if dark else "black"
            axis.text(j, i, form.format(table[i, j]), ha="center", va="center", color=colour, bbox=box)
