"""Questions of samples, a model's answers to them, and how many are right: what `evaluate.py` measures with."""

import re
import string
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from .data import MODEL_INPUTS, Drop, Sample, media_parts
from .sources import open_media

LETTER = re.compile(r"(?:answer:?\s*|option\s+)?\(?([a-z])(?:[).:,]|\s*$)", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One user turn of a sample."""

    id: str
    type: str
    messages: list  # media so far and the question
    expected: str
    tokens: int = 0  # of the whole sample


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
            questions.append(Question(f"{sample.id} {i}", kind, messages, expected, sample.tokens))
    return questions


class Prompts(Dataset):
    """The open questions of each sample as model inputs; its media are decoded once for all of them."""

    def __init__(self, samples: list[list[Question]], processor):
        self.samples, self.processor = samples, processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> list[tuple[Question, dict[str, torch.Tensor]]] | Drop:
        prompts, known = [], (None,)  # media, their features, and the tokens of a prompt up to them
        for question in self.samples[index]:
            try:
                media = media_parts(question.messages)
                if known[0] != media:
                    inputs = self.processor.apply_chat_template(
                        open_media(question.messages),
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=True,
                        return_tensors="pt",
                    )
                    features = {name: torch.as_tensor(inputs[name]) for name in MODEL_INPUTS if name in inputs}
                    ids = inputs["input_ids"][0]
                    known = media, features, ids[: len(ids) - len(self.last_ids(question))]
                ids = torch.cat([known[2], self.last_ids(question)])
                prompts.append((question, {"input_ids": ids, **known[1]}))
            except Exception as error:  # noqa: BLE001  one broken file must not end the run
                return Drop(question.id, f"{type(error).__name__}: {error}")
        return prompts

    def last_ids(self, question: Question) -> torch.Tensor:
        """int64 [length]: the tokens after the last image or video of a question; all, if it has none."""
        text = self.processor.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        for token in (self.processor.image_token, self.processor.video_token):
            text = text.rpartition(token)[2]
        return torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


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
        # A set, since the type of a question without one is "all", too.
        for group in {(kind, length) for kind in ("all", entry["type"]) for length in ("all", bucket)}:
            groups[group].append(entry["correct"])
    table = defaultdict(dict)
    for (kind, bucket), values in groups.items():
        table[kind][bucket] = {"accuracy": round(sum(values) / len(values), 4), "questions": len(values)}
    return dict(table)
