"""Compare `nsa_variant="merged"` with dense attention and with other training-free sparse methods, on one checkpoint.

    python examples/compare_sparse.py VideoNSA-7B haystack/test.json comparison.json --figure comparison.png
    python examples/compare_sparse.py build/tiny/dense-4 needles/test.json out.json --settings '{"block_count": 8}'

DATA is a file as for `evaluate.py`; its questions are asked once with dense attention, and once with each method. For
each method and length of the prompt, up to the next power of two of vision tokens, OUTPUT has
    share      pairs of query and key that are attended, of those of dense causal attention over the whole prompt
    agreement  share of answers that are the dense model's, word for word, in all and by question type
    accuracy   share of right answers
    error      of each layer's attention output against the dense model's, relative, over all tokens of the prompt
    seconds    of the decoder's prefill, median; here no method but dense and merged has code made to be fast
The parameter of each baseline (`lib/sparse_baselines.py`) is set per length, by bisection on a few prompts, so that it
computes the share that the first of the settings computes. A later run with other settings adds its rows to OUTPUT.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from lib.answering import Prompts, Question, answer, is_correct, list_questions, normalise
from lib.data import Drop, Sample, load_samples
from lib.folders import check_source
from lib.options import OptionParser, add_device
from lib.sparse_baselines import METHODS, Prefill
from videonsa import nsa_merged
from videonsa.configuration_videonsa import NSA_FIELDS
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.processing_videonsa import VideoNSAProcessor

DENSE = "dense"
KEYS = ("method", "vision_tokens", "matched")  # what tells rows apart


class Prefills:
    """Records of the decoder's prefills: outputs of its attention layers, seconds, and pairs computed by merged."""

    def __init__(self, model):
        self.decoder = model.model.language_model
        self.hooks = []

    def __enter__(self):
        self.outputs, self.seconds, self.chosen, self.counts = [], [], [], []
        self.hooks = [
            self.decoder.register_forward_pre_hook(self.start, with_kwargs=True),
            self.decoder.register_forward_hook(self.stop, with_kwargs=True),
            *(layer.self_attn.register_forward_hook(self.keep) for layer in self.decoder.layers),
        ]
        self.select = nsa_merged.choose
        nsa_merged.choose = self.count
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        nsa_merged.choose = self.select

    def start(self, module, args, kwargs):
        self.began = time.perf_counter()

    def stop(self, module, args, kwargs, output):
        if output.last_hidden_state.shape[1] > 1:
            self.seconds.append(time.perf_counter() - self.began)

    def keep(self, module, args, output):
        if output[0].shape[1] > 1:
            self.outputs.append(output[0][0])
            # Queries before the first choice see all keys.
            dense = min((first for first, _ in self.counts), default=0)
            keys = dense * (dense + 1) / 2
            for start in {first for first, _ in self.counts}:  # heads that choose for themselves are averaged
                keys += statistics.fmean(count for first, count in self.counts if first == start)
            self.chosen.append(keys if self.counts else None)
            self.counts = []

    def count(self, q, k, *args, block_size, **kwargs):
        """`_select`, noting the first query and the number of chosen keys, averaged over KV heads; a mean of the
        remainder counts as a key."""
        chosen = self.select(q, k, *args, block_size=block_size, **kwargs)  # bool [G, queries, blocks]
        first = len(k) - len(q)
        seen = torch.arange(first + 1, len(k) + 1, device=q.device)[:, None]
        starts = torch.arange(chosen.shape[-1], device=q.device) * block_size
        keys = (seen - starts).clamp(0, block_size) * chosen
        total = keys.sum()
        if self.decoder.config.block_remainder:
            total += len(chosen) * (seen // block_size).sum() - (keys == block_size).sum()
        self.counts.append((first, float(total) / len(chosen)))
        return chosen


def merged_shares(prefill: Prefills, vision: torch.Tensor) -> list[float]:
    """Share of the causal pairs of a prompt that each layer of "merged" computed; layers without a choice are dense."""
    n = len(vision)
    rows = torch.arange(1, n + 1)
    before = (~vision).cumsum(0)  # text keys of each query
    others = float(rows[~vision].sum() + before[vision].sum())
    return [1.0 if keys is None else (others + keys) / (n * (n + 1) / 2) for keys in prefill.chosen]


def run(model, processor, prompt, method, vision, max_new_tokens):
    """The answer to a prompt with a method (settings of merged, a baseline, or DENSE), and what was recorded of it."""
    config = model.config
    before = {name: getattr(config, name) for name in NSA_FIELDS}
    try:
        with Prefills(model) as prefill:
            if isinstance(method, dict):
                for name, value in {"nsa_variant": "merged", **method}.items():
                    setattr(config, name, value)
                text = answer(model, processor, [prompt], max_new_tokens)[0]
                shares = merged_shares(prefill, vision)
            else:
                config.nsa_variant = DENSE
                if method == DENSE:
                    text, shares = answer(model, processor, [prompt], max_new_tokens)[0], [1.0]
                else:
                    with Prefill(model, method) as patched:
                        text = answer(model, processor, [prompt], max_new_tokens)[0]
                    shares = patched.shares
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    return text, statistics.fmean(shares), prefill.outputs, prefill.seconds[0]


def calibrate(run_one, prompts, kind, wanted: float, block_size: int, steps: int = 8) -> float:
    """The level at which a baseline computes the share `wanted` of the pairs of some prompts."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        level = (low + high) / 2
        share = statistics.fmean(run_one(prompt, kind(level, vision, block_size))[1] for prompt, vision in prompts)
        low, high = (level, high) if share < wanted else (low, level)
    return (low + high) / 2


def compare(args) -> dict:
    """Ask all questions with all methods; writes OUTPUT after each length, and returns its content."""
    folder = check_source("model", args.model)
    settings = [json.loads(text) for text in args.settings]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    model = VideoNSAForConditionalGeneration.from_pretrained(folder, nsa_variant="merged", nsa_backend="torch")
    model = model.to(args.device).eval()
    processor = VideoNSAProcessor.from_pretrained(folder, trust_remote_code=True)
    by_length = group_by_length(args, processor)
    result = {
        "model": Path(args.model).name,
        "data": Path(args.data).parent.name,
        "block_size": model.config.block_size,
        "window_size": model.config.window_size,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    rows = read_rows(Path(args.output), result)
    for length, samples in by_length.items():
        prompts = make_prompts(model, processor, samples)
        records = ask_all_methods(model, processor, prompts, settings, args)
        for name, entries in records.items():
            row = {"matched": json.dumps(settings[0]), **summary(name, length, len(samples), entries)}
            rows = [other for other in rows if any(other[key] != row[key] for key in KEYS)] + [row]
            print(format_row(row), flush=True)
        Path(args.output).write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return {**result, "rows": rows}


def group_by_length(args, processor) -> dict[int, list[Sample]]:
    """The first samples of each length: of vision tokens, up to the next power of two."""
    samples, drops = load_samples([args.data], processor)
    by_length = defaultdict(list)
    for sample in samples:
        by_length[1 << (sample.vision_tokens - 1).bit_length()].append(sample)
    lengths = sorted(args.lengths or by_length)
    if not lengths or not {*lengths} <= by_length.keys():
        there = ", ".join(map(str, sorted(by_length))) or f"none; {len(drops)} samples were dropped"
        raise ValueError(f"--lengths {args.lengths} must be among those of the data: {there}")
    return {length: by_length[length][: args.clips] for length in lengths}


def make_prompts(model, processor, samples: list[Sample]) -> list[tuple[Question, dict, torch.Tensor]]:
    """Each question with its model inputs and, bool [tokens], which of these are vision."""
    prompts = []
    made = Prompts([list_questions(sample) for sample in samples], processor)
    for found in map(made.__getitem__, range(len(made))):
        if isinstance(found, Drop):
            raise ValueError(f"{found.id}: {found.reason}")
        prompts += [(*pair, model.model.token_types(pair[1]["input_ids"]) > 0) for pair in found]
    return prompts


def ask_all_methods(model, processor, prompts: list, settings: list[dict], args) -> dict[str, list[tuple]]:
    """Records of the answers of each method, for `summary`. Baselines compute as many pairs as the first settings."""

    def run_one(prompt, method, vision):
        return run(model, processor, prompt, method, vision, args.max_new_tokens)

    block_size = model.config.block_size
    methods = {json.dumps(setting): (lambda vision, setting=setting: setting) for setting in settings}
    few = [(prompt, vision) for _, prompt, vision in prompts[:: max(1, len(prompts) // args.tune)]]
    wanted = statistics.fmean(run_one(prompt, settings[0], vision)[1] for prompt, vision in few)
    for name in args.baselines:
        kind = METHODS[name]
        level = calibrate(
            lambda prompt, method: run_one(prompt, method, method.vision), few, kind, wanted, block_size
        )  # fmt: skip
        methods[name] = lambda vision, kind=kind, level=level: kind(level, vision, block_size)

    records = defaultdict(list)
    for question, prompt, vision in prompts:
        text, _, dense, seconds = run_one(prompt, DENSE, vision)
        truth = [text, question.expected, question.type]
        records[DENSE].append((*truth, text, 1.0, [0.0] * len(dense), seconds))
        for name, make in methods.items():
            other, share, outputs, seconds = run_one(prompt, make(vision), vision)
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(outputs, dense, strict=True)]
            records[name].append((*truth, other, share, errors, seconds))
    return records


def read_rows(output: Path, result: dict) -> list[dict]:
    """The rows of earlier runs on the same checkpoint and data."""
    if not output.exists():
        return []
    before = json.loads(output.read_text())
    rows = before.pop("rows")
    if before != result:
        other = ", ".join(name for name in result if before.get(name) != result[name])
        raise ValueError(f"output {output} is of runs with another {other}; name another file")
    return rows


def summary(name, length, clips, entries) -> dict:
    def rate(values):
        return round(statistics.fmean(values), 4)

    kinds = defaultdict(list)
    for dense, expected, kind, text, *_ in entries:
        kinds[kind].append((normalise(text) == normalise(dense), is_correct(text, expected)))
    return {
        "method": name,
        "vision_tokens": length,
        "clips": clips,
        "questions": len(entries),
        "share": rate([entry[4] for entry in entries]),
        "agreement": rate([same for pairs in kinds.values() for same, _ in pairs]),
        "accuracy": rate([right for pairs in kinds.values() for _, right in pairs]),
        "by_type": {
            kind: {"agreement": rate([a for a, _ in x]), "accuracy": rate([b for _, b in x]), "questions": len(x)}
            for kind, x in sorted(kinds.items())
        },
        "error": [rate(errors) for errors in zip(*(entry[5] for entry in entries), strict=True)],
        "seconds": round(statistics.median(entry[6] for entry in entries), 4),
    }  # fmt: skip


def format_row(row: dict) -> str:
    kinds = "  ".join(
        f"{kind} {100 * x['agreement']:.0f}/{100 * x['accuracy']:.0f}" for kind, x in row["by_type"].items()
    )
    errors = " ".join(f"{x:.2f}" for x in row["error"])
    return (
        f"{row['vision_tokens']:>6,}  {row['method']:<40} share {100 * row['share']:5.1f} %  agreement "
        f"{100 * row['agreement']:5.1f} %  accuracy {100 * row['accuracy']:5.1f} %  ({kinds})  error {errors}  "
        f"{row['seconds']:.3f} s"
    )  # fmt: skip


def draw(result: dict, path: Path) -> None:
    """Agreement over computed share, and the error of each layer, for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row["vision_tokens"] for row in result["rows"]})
    figure, axes = pyplot.subplots(2, len(lengths), figsize=(5 * len(lengths), 9), squeeze=False, layout="constrained")
    families = sorted({family(row["method"]) for row in result["rows"]} - {DENSE}, key=lambda x: (x in METHODS, x))
    styles = {
        name: {"color": pyplot.cm.tab20(i), "marker": "x" if name in METHODS else "o", "label": name}
        for i, name in enumerate(families)
    }
    for (top, bottom), length in zip(axes.T, lengths, strict=True):
        rows = [row for row in result["rows"] if row["vision_tokens"] == length and row["method"] != DENSE]
        for name in families:
            points = sorted(
                (100 * row["share"], 100 * row["agreement"]) for row in rows if family(row["method"]) == name
            )
            top.plot([x for x, _ in points], [y for _, y in points], ls=":" if name in METHODS else "-", **styles[name])
        first = next(row for row in rows if row["method"] == row["matched"])
        for row in rows:
            near = row["method"] in METHODS or abs(row["share"] - first["share"]) < 0.05
            if row["matched"] == first["matched"] and near:
                name, layers = family(row["method"]), range(1, len(row["error"]) + 1)
                bottom.plot(layers, row["error"], ls=":" if name in METHODS else "-", **styles[name])
        top.set(title=f"≤ {length:,} vision tokens", xlabel="pairs computed, %", ylabel="answers as dense, %")
        bottom.set(
            xlabel="layer", xticks=layers, ylim=(0, None),
            ylabel=f"error of attention, at {100 * first['share']:.0f} % of the pairs",
        )  # fmt: skip
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=90)


def family(method: str) -> str:
    """What rows of a figure's line have in common: all but the number of blocks."""
    if not method.startswith("{"):
        return method
    setting = json.loads(method)
    setting.pop("block_count", None)
    return ", ".join(["merged", *(f"{key}={value}" for key, value in setting.items())])


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a VideoNSA or stock Qwen2.5-VL checkpoint")
    parser.add_argument("data", help=".json or .jsonl file of conversations")
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--figure", help="PNG file to write (needs matplotlib)")
    parser.add_argument(
        "--settings", nargs="+", default=['{"block_count": 32}'], metavar="JSON",
        help='fields of merged, such as \'{"block_count": 8, "block_per_head": true}\'; baselines match the first',
    )  # fmt: skip
    parser.add_argument(
        "--baselines", nargs="*", default=list(METHODS), choices=METHODS, help="methods to compare with (default: all)"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="lengths in vision tokens, powers of two (default: all)")
    parser.add_argument("--clips", type=int, default=25, help="samples of each length")
    parser.add_argument("--tune", type=int, default=4, help="prompts that the parameter of a baseline is set on")
    parser.add_argument("--max_new_tokens", type=int, default=12, help="most tokens of an answer")
    add_device(parser, auto=False)
    args = parser.parse_args()
    result = compare(args)
    if args.figure:
        draw(result, Path(args.figure))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
