"""Measure how often a model answers questions about videos and images exactly right.

    python examples/evaluate.py VideoNSA-7B haystack/test.json results.json
    python examples/evaluate.py VideoNSA-7B haystack/test.json dense.json --variant dense --batch-size 4

DATA is a file as for `finetune.py`. Every user turn of a sample is asked by itself, after the media that come up to it;
the assistant turn is the right answer: a letter ("B", "(B) a boat") or words, compared without regard to case and
punctuation at the ends. Accuracy is given by question type (`types` of a record, one for each answer, or `type`) and by
the length of the prompt in tokens, up to the next power of two.

Answers are kept in OUTPUT.partial as they come, so that an interrupted run goes on where it was.
"""

import argparse
import json
import re
import string
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import MODEL_INPUTS, Drop, Sample, load_samples, media_parts
from demo import load

LETTER = re.compile(r"(?:answer:?\s*|option\s+)?\(?([a-z])(?:[).:,]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One user turn of a sample."""

    id: str
    type: str
    messages: list  # media so far and the question
    expected: str


def list_questions(sample: Sample) -> list[Question]:
    """The user turns of a sample that an assistant turn follows; each gets all media up to it and its own text only."""
    system = [message for message in sample.messages if message["role"] == "system"]
    types = sample.record.get("types") or sample.record.get("type") or "all"
    questions, media = [], []
    for message, reply in zip(sample.messages, sample.messages[1:], strict=False):
        if message["role"] != "user":
            continue
        media += media_parts([message])
        if reply["role"] == "assistant":
            i = len(questions)
            text = [part for part in message["content"] if part["type"] == "text"]
            kind = str(types if not isinstance(types, list) else types[i] if i < len(types) else "all")
            messages = [*system, {"role": "user", "content": [*media, *text]}]
            expected = "".join(part["text"] for part in reply["content"])
            questions.append(Question(f"{sample.id} {i}", kind, messages, expected))
    return questions


class Prompts(Dataset):
    """The open questions of each sample as model inputs; its media are decoded once for all of them."""

    def __init__(self, samples: list[list[Question]], processor):
        self.samples, self.processor = samples, processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> list[tuple[Question, dict[str, torch.Tensor]]] | Drop:
        prompts, known = [], (None, None)
        for question in self.samples[index]:
            try:
                media = media_parts(question.messages)
                if known[0] != media:
                    inputs = self.processor.apply_chat_template(
                        question.messages,
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=True,
                        return_tensors="pt",
                    )
                    known = media, {name: torch.as_tensor(inputs[name]) for name in MODEL_INPUTS if name in inputs}
                prompts.append((question, {"input_ids": self.token_ids(question, known[1]), **known[1]}))
            except Exception as error:  # noqa: BLE001  one broken file must not end the run
                return Drop(question.id, f"{type(error).__name__}: {error}")
        return prompts

    def token_ids(self, question: Question, features) -> torch.Tensor:
        """int64 [length]: what the processor makes of the question, with the placeholders that its media need."""
        text = self.processor.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        merge = self.processor.video_processor.merge_size**2
        counts = {
            getattr(self.processor, f"{kind}_token_id"): iter((features[f"{kind}_grid_thw"].prod(-1) // merge).tolist())
            for kind in ("image", "video")
            if f"{kind}_grid_thw" in features
        }
        return torch.tensor([id for id in ids for _ in range(next(counts[id]) if id in counts else 1)])


def answer(model, processor, batch: list[dict[str, torch.Tensor]], max_new_tokens: int) -> list[str]:
    """Greedy answers to prompts of any lengths, padded on the left."""
    length = max(len(prompt["input_ids"]) for prompt in batch)
    inputs = {"input_ids": torch.full((len(batch), length), processor.tokenizer.pad_token_id)}
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    for row, prompt in enumerate(batch):
        inputs["input_ids"][row, length - len(prompt["input_ids"]) :] = prompt["input_ids"]
        inputs["attention_mask"][row, length - len(prompt["input_ids"]) :] = 1
    for name in MODEL_INPUTS:
        parts = [prompt[name] for prompt in batch if name in prompt]
        if parts:
            inputs[name] = torch.cat(parts)
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def answer_all(
    model, processor, samples, *, batch_size: int, max_new_tokens: int, workers: int
) -> Iterator[dict | Drop]:
    """An entry for each question of samples [[Question]], in their order, or a Drop for a sample that cannot be read.

    `seconds` of an entry is its share of the time that its batch took to generate; decoding of videos is not in it.
    """

    def entries(batch):
        start = time.perf_counter()
        texts = answer(model, processor, [prompt for _, prompt in batch], max_new_tokens)
        seconds = (time.perf_counter() - start) / len(batch)
        for (question, prompt), text in zip(batch, texts, strict=True):
            yield {
                "id": question.id,
                "type": question.type,
                "tokens": len(prompt["input_ids"]),
                "expected": question.expected,
                "answered": text,
                "correct": is_correct(text, question.expected),
                "seconds": seconds,
            }

    loader = DataLoader(
        Prompts(samples, processor), batch_size=None, num_workers=workers, collate_fn=lambda prompts: prompts
    )
    batch = []
    for prompts in loader:
        if isinstance(prompts, Drop):
            yield prompts
            continue
        for prompt in prompts:
            batch.append(prompt)
            if len(batch) == batch_size:
                yield from entries(batch)
                batch = []
    if batch:
        yield from entries(batch)


def is_correct(answered: str, expected: str) -> bool:
    """Whether two answers are the same: letters where a letter is expected, words otherwise."""
    wanted = normalise(expected)
    if re.fullmatch("[a-z]", wanted) or re.match(r"(answer:?\s*)?\(?[a-z][).:]\s", expected, re.IGNORECASE):
        letters = [LETTER.match(text.strip()) for text in (answered, expected)]
        return all(letters) and letters[0][1].lower() == letters[1][1].lower()
    return normalise(answered) == wanted


def normalise(text: str) -> str:
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def accuracy(answers: list[dict]) -> dict:
    """Share of right answers and their number: in all, by type, by length, and by both."""
    groups = defaultdict(list)
    for entry in answers:
        bucket = str(1 << (entry["tokens"] - 1).bit_length())
        for group in (("all", "all"), (entry["type"], "all"), ("all", bucket), (entry["type"], bucket)):
            groups[group].append(entry["correct"])
    table = defaultdict(dict)
    for (kind, bucket), values in groups.items():
        table[kind][bucket] = {"accuracy": round(sum(values) / len(values), 4), "questions": len(values)}
    return dict(table)


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
    model, processor = load(args.model, args.variant, args.device)
    video = processor.video_processor
    if args.fps:
        video.fps = args.fps
    if args.max_frames:
        video.max_frames = args.max_frames
    roots = [args.media_root] if args.media_root else []
    samples, drops = load_samples([args.data], processor, roots=roots)
    samples.sort(key=lambda sample: sample.tokens)  # prompts of a batch are then of about one length
    questions = [list_questions(sample) for sample in samples]
    if args.limit and args.limit < len(questions):
        questions = [questions[i * len(questions) // args.limit] for i in range(args.limit)]
    count = sum(map(len, questions))
    if not count:
        raise ValueError(f"data {args.data} has no question that can be asked; {len(drops)} samples were dropped")

    settings = {
        name: getattr(args, name)
        for name in ("model", "data", "variant", "fps", "max_frames", "limit", "max_new_tokens")
    }
    settings["checkpoint"] = identify(args.model)
    partial = output.with_name(f"{output.name}.partial")
    answers = read_partial(partial, settings)
    known = {entry["id"] for entry in answers}
    todo = [[q for q in sample if q.id not in known] for sample in questions]
    entries = answer_all(
        model,
        processor,
        [sample for sample in todo if sample],
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        workers=args.workers,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a") as file, tqdm(total=count, initial=len(answers), unit="question", disable=None) as bar:
        if not answers:
            print(json.dumps(settings), file=file, flush=True)
        for entry in entries:
            if isinstance(entry, Drop):
                drops.append(entry)
                continue
            del entry["seconds"]
            answers.append(entry)
            print(json.dumps(entry), file=file, flush=True)
            bar.update()

    result = {
        "settings": settings,
        "nsa": {
            name: getattr(model.config, name) for name in ("nsa_variant", "block_size", "block_count", "window_size")
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "accuracy": accuracy(answers),
        "dropped": [{"id": drop.id, "reason": drop.reason} for drop in drops],
        "answers": sorted(answers, key=lambda entry: entry["id"]),
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    partial.unlink()
    return result


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a VideoNSA repository")
    parser.add_argument("data", help=".json or .jsonl file of conversations; FILE%%10 takes a random tenth of it")
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--media-root", help="folder that media paths are relative to (default: that of DATA)")
    parser.add_argument(
        "--variant", help="what vision tokens compute: paper, released, merged or dense (default: the checkpoint's)"
    )
    parser.add_argument("--fps", type=float, help="frames per second (default: the processor's)")
    parser.add_argument("--max-frames", type=int, help="longer videos are sampled more sparsely")
    parser.add_argument("--batch-size", type=int, default=1, help="questions at a time (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: 32)")
    parser.add_argument("--limit", type=int, help="samples to take, spread over the lengths (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: 2)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help='or "auto" (default: %(default)s)'
    )
    args = parser.parse_args()
    try:
        result = evaluate(args)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
    print(format_table(result["accuracy"]))
    for drop in result["dropped"][:10]:
        print(f"dropped {drop['id']}: {drop['reason']}")
    print(f"wrote {args.output}" + (f"; {len(result['dropped'])} dropped" if result["dropped"] else ""))


if __name__ == "__main__":
    main()
