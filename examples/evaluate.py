"""Measure how often a model answers questions about videos and images exactly right.

    python examples/evaluate.py VideoNSA-7B haystack/test.json results.json
    python examples/evaluate.py VideoNSA-7B haystack/test.json dense.json --nsa_variant dense --batch_size 4

DATA is a file, a folder or a data set of the Hub as for `finetune.py`; of the last two, the test split is read. Every
user turn of a sample is asked by itself, after the media that come up to it; the assistant turn is the right answer: a
letter ("B", "(B) a boat") or words, compared without regard to case and punctuation at the ends. Accuracy is given by
question type (`types` of a record, one for each answer, or `type`) and by the length of the prompt in tokens, up to the
next power of two.

Answers are kept in OUTPUT.partial as they come, so that an interrupted run goes on where it was.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from lib.answering import Question, accuracy, answer_all, list_questions
from lib.data import Drop, list_reasons, load_samples
from lib.fields import MEANINGS, add_fields, given_fields
from lib.folders import check_source
from lib.loading import load
from lib.options import OptionParser, add_device
from lib.progress import Forecast, prefill_progress
from lib.times import duration

# Seconds between two forecasts.
REFRESH = 1.0


def format_table(table: dict) -> str:
    """Rows are types, columns lengths; a cell is percent (questions)."""
    columns = ["all", *sorted({b for row in table.values() for b in row} - {"all"}, key=int)]
    head = ["type", *("all" if b == "all" else f"≤ {int(b):,}" for b in columns)]
    rows = [head]
    for kind in ["all", *sorted(set(table) - {"all"})]:
        cells = [table[kind].get(b) for b in columns]
        rows.append([kind, *(f"{100 * c['accuracy']:.1f} ({c['questions']:,})" if c else "" for c in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def evaluate(args) -> dict:
    """Answer all questions and return the content of OUTPUT.

    Raises:
        ValueError: the data has no question, or OUTPUT.partial is of another run.
    """
    output = Path(args.output)
    if output.exists():
        raise ValueError(f"output {output} exists already; name a new file")
    model, processor = load(args.model, args.device, **given_fields(args))
    questions, drops = open_questions(args, processor)

    settings = {
        name: getattr(args, name)
        for name in ("model", "data", "nsa_variant", "fps", "max_frames", "limit", "max_new_tokens")
    }
    settings["checkpoint"] = identify(check_source("model", args.model))
    partial = output.with_name(f"{output.name}.partial")
    answers = read_partial(partial, settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a") as file:
        if not answers:
            print(json.dumps(settings), file=file, flush=True)
        for entry in answer_rest(model, processor, questions, answers, args):
            if isinstance(entry, Drop):
                drops.append(entry)
                continue
            del entry["seconds"]
            answers.append(entry)
            print(json.dumps(entry), file=file, flush=True)

    result = {
        "settings": settings,
        "nsa": {name: getattr(model.config, name) for name in MEANINGS if hasattr(model.config, name)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "accuracy": accuracy(answers),
        "dropped": [{"id": drop.id, "reason": drop.reason} for drop in drops],
        "answers": sorted(answers, key=lambda entry: entry["id"]),
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    partial.unlink()
    return result


def open_questions(args, processor) -> tuple[list[list[Question]], list[Drop]]:
    """The questions of each sample, the shortest sample first, and the samples that are dropped.

    Videos are read as the arguments say: the processor is changed.
    """
    video = processor.video_processor
    if args.fps:
        video.fps = args.fps
    if args.max_frames:
        video.max_frames = args.max_frames
    roots = [args.media_root] if args.media_root else []
    samples, drops = load_samples([args.data], processor, roots=roots)

    # Prompts of a batch are then of about one length.
    samples.sort(key=lambda sample: sample.tokens)
    questions = [list_questions(sample) for sample in samples]
    if args.limit and args.limit < len(questions):
        questions = [questions[i * len(questions) // args.limit] for i in range(args.limit)]
    if not any(questions):
        why = f"; {len(drops):,} samples were dropped: {list_reasons(drops)}" if drops else ""
        raise ValueError(f"data {args.data} has no question that can be asked{why}")
    return questions, drops


def answer_rest(model, processor, questions: list[list[Question]], answers: list[dict], args) -> Iterator[dict | Drop]:
    """See `answer_all`, for the questions that have no answer yet."""
    known = {entry["id"] for entry in answers}
    left = [[question for question in sample if question.id not in known] for sample in questions]
    entries = answer_all(
        model,
        processor,
        [sample for sample in left if sample],
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        workers=args.workers,
    )
    left = [question.tokens for sample in left for question in sample]
    total, form = len(known) + len(left), "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    with tqdm(total=total, initial=len(known), unit="question", bar_format=form, disable=None) as bar:
        # The bar's own forecast takes all questions for equally long; the shortest come first.
        rest = Rest(left)
        with nullcontext() if bar.disable else prefill_progress(model, bar.set_postfix_str):
            for entry in entries:
                bar.update(not isinstance(entry, Drop))
                if not isinstance(entry, Drop):
                    bar.set_postfix_str(rest.after(entry))
                yield entry


class Rest:
    """How long the rest of the questions takes: what `Forecast` says of their tokens, times the share of the time that
    passed beside generating, in which videos are decoded."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.answered, self.forecast = tokens, 0, Forecast()
        self.start = self.said = time.perf_counter()
        self.text = ""

    def after(self, entry: dict) -> str:
        """What to show once this question is answered; anew every second."""
        self.forecast.add(entry["tokens"], entry["seconds"])
        self.answered += 1
        now, left = time.perf_counter(), self.tokens[self.answered :]
        if left and now - self.said >= REFRESH:
            self.said = now
            generating = sum(seconds for _, seconds in self.forecast.measured)
            share = max(1.0, (now - self.start) / generating)
            least, most = (duration(share * seconds) for seconds in self.forecast.between(*left))
            self.text = f"about {least} left" if least == most else f"{least} to {most} left"
        return self.text if left else ""


def identify(model: str) -> list:
    """What tells the weights of a local folder from others that were at the same path."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def read_partial(path: Path, settings: dict) -> list[dict]:
    """The answers of an interrupted run with the same settings; a line that was being written is cut off."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(whole))
    if not whole:
        return []
    before = json.loads(whole[0])
    if before != settings:
        other = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{path} is of a run with another {other}; remove it or name another output")
    return [json.loads(line) for line in whole[1:]]


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a VideoNSA repository")
    parser.add_argument("data", help="conversations, as for finetune.py; DATA%%10 takes a random tenth of them")
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--media_root", help="folder that media paths are relative to (default: that of DATA)")
    add_fields(parser, "nsa_variant", "nsa_backend")
    parser.add_argument("--fps", type=float, help="frames per second (default: the processor's)")
    parser.add_argument(
        "--max_frames", type=int, help="most frames of a video; longer videos are sampled more sparsely"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="questions that are answered at a time")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--limit", type=int, help="samples to take, spread over the lengths (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode videos")
    add_device(parser)
    args = parser.parse_args()
    result = evaluate(args)
    print(format_table(result["accuracy"]))
    if empty := sum(not entry["answered"].strip() for entry in result["answers"]):
        print(f"{empty:,} of {len(result['answers']):,} answers are empty: the model ended them at once")
    for drop in result["dropped"][:10]:
        print(f"dropped {drop['id']}: {drop['reason']}")
    print(f"wrote {args.output}" + (f"; {len(result['dropped'])} dropped" if result["dropped"] else ""))


if __name__ == "__main__":
    main()
