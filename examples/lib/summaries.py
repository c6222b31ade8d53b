"""What `analyze.py` found, in a few lines for a terminal.

Every function takes the content of FINDING.json and returns lines; `summarize` chooses by its name.
"""

from .times import clock


def summarize(result: dict) -> list[str]:
    """The finding in a few lines, and the time that it took."""
    took = f"{result['took_seconds']:,.0f} s on {result['device']}"
    return [*SUMMARIES[result["finding"]](result), f"took {took}"]


def transfer(result) -> list[str]:
    rows = result["accuracy"]
    questions = next(iter(rows.values()))["all"]["all"]["questions"]
    first, *others = rows
    lines = [f"accuracy over {questions} questions: " + listed({name: whole(rows[name]) for name in rows})]
    same = {name: percent(result["agreement"][first][name]) for name in others}
    return [*lines, f"same answers as {first}: " + listed(same)]


def scaling(result) -> list[str]:
    lengths = {f"{row['tokens']:,.0f} tokens": row for row in result["by_length"].values()}
    spent = [
        f"best way to spend {best['context']:,} tokens: {best['frames']} frames, {best['frame_tokens']} tokens per two"
        for best in result["best_splits"]
    ]
    return [
        "accuracy by length: " + listed({name: percent(row["accuracy"]) for name, row in lengths.items()}),
        "seconds per question: " + listed({name: f"{row['seconds']:.2f}" for name, row in lengths.items()}),
        *spent,
    ]


def budget(result) -> list[str]:
    cells = [cell for cell in result["cells"] if cell["questions"]]
    trained = [cell for cell in cells if cell["trained"]]
    best, worst = (pick(cells, key=lambda cell: cell["accuracy"]) for pick in (max, min))
    named = [*(("trained", cell) for cell in trained), ("best", best), ("worst", worst)]
    return [
        f"{name:<8}{cell['block_count']} blocks, window {cell['window_size']}: accuracy {percent(cell['accuracy'])}, "
        f"{percent(cell['share'])} of dense attention's pairs"
        for name, cell in named
    ]


def gates(result) -> list[str]:
    branches, layers = result["branches"], result["mean"]
    lines = [
        f"mean gates, layer {i}: " + listed({b: f"{x:.2f}" for b, x in zip(branches, layers[i], strict=True)})
        for i in sorted({0, len(layers) - 1})
    ]
    runs = {name: row["all"]["all"] for name, row in result["ablation"].items()}
    every, *fewer = runs
    alone = {name: percent(runs[name]["accuracy"]) for name in branches}
    pairs = {name: percent(runs[name]["accuracy"]) for name in fewer if name not in branches}
    about = f"accuracy over {runs[every]['questions']} questions: all branches {percent(runs[every]['accuracy'])}"
    return [*lines, f"{about}; one alone: {listed(alone)}", "two of them: " + listed(pairs)]


def latency(result) -> list[str]:
    rows = [row for row in result["rows"] if "ms" in row]
    lines = [f"nsa_{result['kernel']}, {result['dtype']}, ms of one layer"]
    for tokens in sorted({row["tokens"] for row in rows}):
        times = {row["part"]: f"{row['ms']:.3g}" for row in rows if row["tokens"] == tokens}
        lines.append(f"{tokens:>7,} tokens: {listed(times)}")
    return lines


def sinks(result) -> list[str]:
    found = result["branches"]
    shares, above = ({n: percent(x[key]) for n, x in found.items()} for key in ("share", "attention_only"))
    return [
        f"sinks, of all keys of {result['clips']} clips: {listed(shares)}",
        f"keys that receive more than 0.1: {listed(above)}",
    ]


def needles(result) -> list[str]:
    rows = {}
    for cell in result["cells"]:
        rows.setdefault(cell["frames"], []).append(cell)
    depths = [f"{cell['depth']:.0%}" for cell in next(iter(rows.values()))]
    lines = [f"accuracy with the needle at {', '.join(depths)} of the clip"]
    for frames, row in rows.items():
        parts = {
            part: " ".join(percent(cell[part]["accuracy"]) if cell[part]["questions"] else "-" for cell in row)
            for part in ("what", "when")
        }
        lines.append(f"{frames:>5,} frames: {listed(parts)}")
    return lines


def looked_at(result) -> list[str]:
    scores, seconds = result["frames"], result["seconds"]

    def best(name: str) -> str:
        order = sorted(range(len(seconds)), key=lambda i: -scores[name][i])
        return ", ".join(clock(seconds[i]) for i in order[:3])

    return [
        f"question  {result['question']}",
        f"answer    {result['answer'] or '(empty)'}",
        f"attended by the answer: {best('answer')}",
        *(f"chosen by vision tokens in the {name} layers: {best(name)}" for name in scores if name != "answer"),
    ]


SUMMARIES = {
    "transfer": transfer,
    "scaling": scaling,
    "budget": budget,
    "gates": gates,
    "latency": latency,
    "sinks": sinks,
    "needles": needles,
    "looked-at": looked_at,
}


def listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def percent(share: float) -> str:
    """As many digits as a small share needs."""
    return f"{100 * share:.{0 if share >= 0.1 or share == 0 else 2}f} %"


def whole(table: dict) -> str:
    return percent(table["all"]["all"]["accuracy"])
