"""Measure how close a model's gates bring its sparse attention to its own dense attention, and how close they could.

    python examples/measure_gates.py VideoNSA-7B needles/test.json gates.json
    python examples/measure_gates.py distilled needles/test.json gates.json --answers paper merged

DATA is a file as for `evaluate.py`, or a folder of videos. Each layer gets what it gets in a dense call, as in
`finetune.py --distill`. By length of the video, up to the next power of two of vision tokens, OUTPUT has for each layer
the squared error of the vision tokens' attention before `o_proj`, relative to the dense one, the mean over heads:
    now        with the model's gates
    constant   with the best gates that are the same for all tokens of these videos
    bound      with the best gates of each token, from 0 to 1: no training of the gates can be better
    merged     of nsa_variant="merged", in whose softmax text is, too; if the settings allow it
    bound at T as `bound`, with logits divided by each of --temperatures
With --answers, the questions of DATA are asked with dense attention and with variants: `agreement` is the share of
answers that are the dense ones, word for word, and `accuracy` that of right ones, by type and by length of the prompt.
Adapters change dense answers: then give the model before training as --teacher, whose dense answers count.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from lib.answering import accuracy, answer_all, list_questions, normalise
from lib.data import Collator, ConversationDataset, Drop, Sample, load_samples
from lib.distill import DenseLayer, best_gates, divide, relative_error, watch_layers
from lib.fields import add_fields, given_fields
from lib.loading import load
from lib.observe import configured
from lib.options import OptionParser, add_device

KINDS = ("now", "constant", "bound", "merged")


class LayerErrors:
    """Adds up the squared errors of a layer over videos.

    Args:
        merged: whether the settings allow the variant "merged".
        temperatures: further ones, by which to divide logits.
    """

    def __init__(self, merged: bool, temperatures: Sequence[float] = ()):
        self.merged = merged
        self.temperatures = temperatures
        self.sums = defaultdict(float)  # of each kind but "constant": [H]
        self.form = None  # GateForm of all tokens together

    def add(self, layer: DenseLayer) -> None:
        form = layer.form()
        for kind, gates in (("now", layer.gates()), ("bound", best_gates(form))):
            self.sums[kind] += form.error(gates).sum(0)
        for temperature in self.temperatures:
            other = layer.form(temperature)
            self.sums[f"bound at {temperature:g}"] += other.error(best_gates(other)).sum(0)
        if self.merged:
            output = layer.sparse("merged")[layer.layout.queries]
            self.sums["merged"] += relative_error(output, layer.target) * form.norm.sum(0)
        self.form = form.sum() if self.form is None else self.form + form.sum()

    def read(self) -> dict[str, float]:
        sums = {**self.sums, "constant": self.form.error(best_gates(self.form))[0]}
        norm = self.form.norm[0]
        kinds = sorted(sums, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
        return {kind: round(divide(sums[kind], norm).mean().item(), 4) for kind in kinds}


def bucket(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


@torch.no_grad()
def measure_layers(model, processor, lengths: dict[int, list[Sample]], temperatures: Sequence[float]) -> list[dict]:
    """Rows of length, number of videos, and the errors of each layer, of samples by their length."""
    collate, rows = Collator(processor), []
    merged = allows(model, "merged")
    for length, found in sorted(lengths.items()):
        layers = [LayerErrors(merged, temperatures) for _ in model.model.language_model.layers]
        data = ConversationDataset(
            found, processor, max_length=max(sample.tokens for sample in found), dtype=model.dtype
        )
        for i in tqdm(range(len(found)), desc=f"{length:,} tokens", disable=None):
            inputs = {name: x.to(model.device) for name, x in collate([data[i]]).items()}
            watch_layers(model, inputs, lambda layer, layers=layers: layers[layer.attention.layer_idx].add(layer))
        rows.append({"vision_tokens": length, "videos": len(found), "layers": [layer.read() for layer in layers]})
    return rows


def allows(model, variant: str) -> bool:
    """Whether the settings of a model allow a variant."""
    with configured(model, nsa_variant=variant):
        try:
            model.config.text_config.validate_variant()
        except ValueError:
            return False
    return True


def compare_answers(model, processor, samples: list[Sample], args) -> dict[str, dict]:
    """Of each variant, after dense: its agreement with dense answers and its accuracy, as tables of `accuracy`."""
    questions = [found for sample in samples if (found := list_questions(sample))]
    if not questions:
        raise ValueError(f"--answers: {args.data} has no questions with answers")
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "workers": args.workers}
    teacher = load(args.teacher, args.device, nsa_variant="dense")[0] if args.teacher else model
    tables, dense = {}, {}
    for variant in ("dense", *args.answers):
        asked = teacher if variant == "dense" else model
        with configured(asked, nsa_variant=variant):
            asked.config.text_config.validate_variant()
            entries = [x for x in answer_all(asked, processor, questions, **options) if not isinstance(x, Drop)]
        dense = dense or {entry["id"]: normalise(entry["answered"]) for entry in entries}
        same = [{**entry, "correct": normalise(entry["answered"]) == dense[entry["id"]]} for entry in entries]
        tables[variant] = {"agreement": accuracy(same), "accuracy": accuracy(entries)}
    return tables


def measure(args) -> dict:
    """Measure all, and write OUTPUT: the layers before the questions are asked."""
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    model, processor = load(args.model, args.device, nsa_variant="paper", **given_fields(args))
    samples, drops = load_samples([args.data], processor, require_answer=False, require_media=True)
    if not samples:
        raise ValueError(f"data {args.data}: no sample can be used; {len(drops):,} are dropped")
    lengths = defaultdict(list)
    for sample in samples:
        lengths[bucket(sample.vision_tokens)].append(sample)
    lengths = {length: found[: args.clips] for length, found in lengths.items()}
    result = {
        "model": Path(args.model).name,
        "data": Path(args.data).parent.name if Path(args.data).is_file() else Path(args.data).name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "rows": measure_layers(model, processor, lengths, args.temperatures),
    }
    write(args.output, result)
    if args.answers:
        result["answers"] = compare_answers(model, processor, [x for found in lengths.values() for x in found], args)
        write(args.output, result)
    return result


def write(output: str, result: dict) -> None:
    Path(output).write_text(json.dumps(result, indent=1) + "\n")


def format_result(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        lines.append(f"{row['videos']} videos of up to {row['vision_tokens']:,} vision tokens")
        for kind in row["layers"][0]:
            errors = "  ".join(f"{layer[kind]:.3f}" for layer in row["layers"])
            lines.append(f"  {kind:<16}{errors}")
    for variant, tables in result.get("answers", {}).items():
        for kind, table in tables.items():
            for length, cell in sorted(
                table["all"].items(), key=lambda item: (item[0] == "all", len(item[0]), item[0])
            ):
                types = "  ".join(
                    f"{name} {100 * cells[length]['accuracy']:.0f}"
                    for name, cells in sorted(table.items())
                    if name != "all" and length in cells
                )
                share = f"{100 * cell['accuracy']:.1f} % of {cell['questions']}"
                lines.append(f"{variant:<7}{kind:<10}{length:>6} tokens  {share}  ({types})")
    return "\n".join(lines)


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a VideoNSA repository, or of an adapter")
    parser.add_argument("data", help="data as for evaluate.py, or a folder of videos")
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--clips", type=int, default=40, help="most samples of each length")
    parser.add_argument("--temperatures", nargs="+", type=float, default=(), help="of logits, for further bounds")
    parser.add_argument("--answers", nargs="+", choices=("paper", "merged"), help="variants that answer the questions")
    parser.add_argument("--teacher", help="model whose dense answers count (default: MODEL)")
    parser.add_argument("--batch_size", type=int, default=1, help="questions that are answered at a time")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode videos")
    add_fields(parser, "nsa_backend")
    add_device(parser)
    args = parser.parse_args()
    print(format_result(measure(args)))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
