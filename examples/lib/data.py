"""Conversations about videos and images, as training samples: formats, checks, tokens, labels, packing, batches.

`load_samples` reads records, from where `sources.py` says, and checks each without decoding; what cannot be used
becomes a `Drop` with its reason. `ConversationDataset` decodes and tokenises one sample at a time, in the workers of a
DataLoader, and `Collator` makes batches. `finetune.py` trains on them; `evaluate.py` reads and checks only.
"""

import bisect
import functools
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import av
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from videonsa.video_inputs import CLIP_KEYS

from .interruption import ignore_signals
from .sources import (
    BadSample,
    Entry,
    Media,
    as_image,
    find_files,
    image_size,
    open_media,
    parse_spec,
    read_entries,
    video_header,
)

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token without loss
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MEDIA = ("image", "video")
TAG = re.compile("(<image>|<video>)")
# What only the chat template may write: in a text they would forge turns or placeholders.
RESERVED = re.compile(r"<\|(?:im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
MOST_FAILURES = 50  # samples in a row that cannot be read, before training stops: then it is not the samples


class Unwanted(BadSample):
    """A record that could be used, and is left out because the user asked for others."""


@dataclass(frozen=True)
class Drop:
    """A record that is not used."""

    id: str
    reason: str
    unwanted: bool = False  # see Unwanted


@dataclass(frozen=True)
class Sample:
    """A record that can be used, in the form of `processor.apply_chat_template`."""

    id: str  # file name and index, and the record's own id if it has one
    messages: list  # of {"role", "content": [{"type": "text" | "image" | "video", ...}]}, media as paths or `Media`
    record: dict
    tokens: int  # as estimated from the headers of the media
    vision_tokens: int


def load_samples(
    specs: Sequence[str],
    processor,
    *,
    split: str = "test",
    roots: Sequence[str] = (),
    max_length: int | None = None,
    frames: tuple[int, int] | None = None,
    max_dropped: float = 1.0,
    seed: int = 0,
    threads: int = 16,
    require_answer: bool = True,
    require_media: bool = False,
) -> tuple[list[Sample], list[Drop]]:
    """Read records and check them: format, tags, media files, token counts.

    Media are opened, not decoded; tokens are counted from their headers.

    Args:
        specs: files, folders or data sets of the Hub: see `find_files`; `name%50` takes half of the records of each
            file, drawn by `seed`.
        processor: of the model.
        split: "train", "eval" or "test": which part of a folder or data set is read.
        roots: folders that media paths are relative to, one for each spec or one for all; default: that of each file.
        max_length: most tokens of a sample.
        frames: fewest and most sampled frames of each video.
        max_dropped: the largest share of the records that may be dropped. What `frames` excludes does not count.
        threads: that open media at the same time.
        require_answer: drop conversations without an assistant turn. Otherwise a folder of videos is data, too.
        require_media: drop conversations without an image or video.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not a list of records; more than `max_dropped` are
            dropped, which is raised as soon as it is sure.
    """
    jobs = list_jobs(specs, split, roots, seed, videos=not require_answer)

    required = {"require_answer": require_answer, "require_media": require_media}
    check = functools.partial(check_job, processor=processor, max_length=max_length, frames=frames, **required)
    samples, drops, dropped = [], [], 0
    pool = ThreadPoolExecutor(threads)
    try:
        for checked in tqdm(pool.map(check, jobs), total=len(jobs), desc="check", unit="sample", disable=None):
            (samples if isinstance(checked, Sample) else drops).append(checked)
            dropped += isinstance(checked, Drop) and not checked.unwanted
            if dropped > max_dropped * len(jobs):
                raise ValueError(too_many_drops(split, drops, len(samples) + len(drops), len(jobs), max_dropped))
    finally:
        pool.shutdown(cancel_futures=True)
    return samples, drops


def list_jobs(
    specs: Sequence[str], split: str, roots: Sequence[str], seed: int, videos: bool = False
) -> list[tuple[str, Entry, Path]]:
    """What is to be checked: names of entries, entries, and the folders that their paths are relative to."""
    if len(roots) not in (0, 1, len(specs)):
        raise ValueError(f"{len(roots)} media roots for {len(specs)} data files; give one for all or one for each")
    jobs = []
    for i, spec in enumerate(specs):
        name, percent = parse_spec(spec)
        for file in find_files(name, split, videos):
            entries = list(enumerate(read_entries(file)))
            if percent < 100:
                count = round(len(entries) * percent / 100)
                chosen = random.Random(f"{seed} {file.name}").sample(range(len(entries)), count)
                entries = [entries[k] for k in sorted(chosen)]
            root = Path(roots[i % len(roots)]) if roots else file.path.parent
            jobs += [(f"{file.name}[{number}]", entry, root) for number, entry in entries]
    return jobs


def check_job(job, processor, max_length: int | None, frames, **required: bool) -> Sample | Drop:
    """The sample of an item of `list_jobs`, or why there is none."""
    name, entry, root = job
    try:
        if isinstance(entry.record, BadSample):
            raise entry.record
        if isinstance(entry.record, dict) and "id" in entry.record:
            name = printable(f"{name} {entry.record['id']}")
        sample = check_record(name, entry, root.resolve(), processor, frames, **required)
        if max_length and sample.tokens > max_length:
            raise BadSample(f"too long: {sample.tokens:,} tokens, of at most {max_length:,}")
        return sample
    except BadSample as error:
        return Drop(name, printable(str(error)), isinstance(error, Unwanted))
    except Exception as error:  # noqa: BLE001  no record may end the check of the others
        return Drop(name, printable(f"cannot be checked: {type(error).__name__}: {error}"))


def too_many_drops(split: str, drops: list[Drop], checked: int, total: int, max_dropped: float) -> str:
    """What to say when more records are dropped than `max_dropped` allows; the rest is not checked any more."""
    drops = [drop for drop in drops if not drop.unwanted]
    return (
        f"--{split}_data: {len(drops):,} of the first {checked:,} records cannot be used, more than --max_dropped "
        f"{max_dropped:g} allows of {total:,}: {list_reasons(drops)}. "
        "To go on without them, raise --max_dropped, up to 1"
    )


def list_reasons(drops: list[Drop]) -> str:
    """The most frequent reasons, each with its count and an example."""
    examples = {}
    for drop in drops:
        examples.setdefault(kind_of(drop), drop)
    counts = Counter(map(kind_of, drops)).most_common(5)
    return "; ".join(f"{count:,} × {kind} (such as {describe(examples[kind])})" for kind, count in counts)


def kind_of(drop: Drop) -> str:
    return drop.reason.split(":")[0]


def describe(drop: Drop) -> str:
    return " ".join(f"{drop.id}: {drop.reason}".split())[:200]


def printable(text: str) -> str:
    """A text of a record, which JSON lets hold half of a surrogate pair, as one that can be printed."""
    return text.encode(errors="backslashreplace").decode()


def check_record(
    name, entry: Entry, root: Path, processor, frames=None, require_answer=True, require_media=False
) -> Sample:
    """The sample of a record, or BadSample."""
    messages = to_messages(entry.record, root, entry.beside)
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    for text in texts:
        if found := RESERVED.search(text):
            raise BadSample(f"the text holds {found[0]}, which only the chat template may write")
    answers = sum(message["role"] == "assistant" for message in messages)
    if require_answer and not answers:
        raise BadSample("no assistant turn")
    if require_media and not media_parts(messages):
        raise BadSample("no image or video")
    text = processor.apply_chat_template(messages, tokenize=False)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = len(answer_spans(ids, processor.tokenizer))
    if found != answers:
        raise BadSample(f"the chat template writes {found} of {answers} assistant turns")
    counts = [count_tokens(part, processor, frames) for part in media_parts(messages)]
    tokens = len(ids) + sum(total - 1 for total, _ in counts)
    return Sample(name, messages, entry.record, tokens, sum(vision for _, vision in counts))


def to_messages(record, root: Path, beside: dict[str, list[Media]] | None = None) -> list[dict]:
    """A record in any of the known formats as chat messages with absolute media paths.

    What stands `beside` the record in its file is found by its name; if the record names no media, all of it is meant.

    - Qwen-VL: `conversations` of {"from", "value"}, the media in `image` and `video`, one or a list, and one tag
      `<image>` or `<video>` in the texts for each.
    - LLaVA-Video-178K: the same, but `<image>` stands for the video, and the folder may be named by `data_source`.
    - chat: `messages` of {"role", "content"}, where content is a text, with tags as above, or a list of parts. Of the
      further keys of a video, those of `CLIP_KEYS`, such as `fps`, hold for it; others, and those of an image, do not.
      A part may be of OpenAI's form, {"type": "video_url", "video_url": {"url"}}.

    Roles may be in any capitals.
    """
    beside = beside or {}
    contents = read_turns(record)
    listed = {kind: listed_media(record, kind) for kind in MEDIA}
    media = [part for _, parts in contents for part in parts if part["type"] in MEDIA]
    tags = Counter(part["type"] for part in media if len(part) == 1)
    if not any(listed.values()) and tags.total() == len(media):
        listed["video"] = beside.get("video", [])
        listed["image"] = beside.get("image", []) if tags["image"] else []
    if listed["video"] and not listed["image"] and tags["image"] and not tags["video"]:
        tags = Counter(video=tags["image"])  # LLaVA-Video writes <image> for a video
        for part in media:
            part.update(type="video") if part["type"] == "image" and len(part) == 1 else None
    for kind in MEDIA:
        if tags[kind] != len(listed[kind]):
            raise BadSample(tags_differ(kind, tags[kind], len(listed[kind])))

    queues = {kind: iter(listed[kind]) for kind in MEDIA}
    source = record.get("data_source")
    messages = []
    for role, parts in contents:
        content = []
        for part in parts:
            if part["type"] in MEDIA:
                kind = part["type"]
                where = next((name for name in (kind, "path", "url") if name in part), None)
                item = part.pop(where) if where else next(queues[kind])
                if isinstance(item, dict):  # a path with settings of its own
                    part, item = {**part, **item, "type": kind}, item.get(kind)
                part[kind] = resolve(item, root, source, beside.get(kind, ()))
            elif not part["text"]:
                continue
            content.append(part)
        messages.append({"role": role, "content": content})
    if not any(part["type"] == "text" for message in messages for part in message["content"]):
        raise BadSample("no text")
    if any(message["role"] == "assistant" and not message["content"] for message in messages):
        raise BadSample("an assistant turn is empty")
    return messages


def read_turns(record) -> list[tuple[str, list[dict]]]:
    """Role and parts of each turn of a record; a tag is a part without a path."""
    if not isinstance(record, dict):
        raise BadSample(f"a record must be an object, got {type(record).__name__}")
    if ("conversations" in record) == ("messages" in record):
        raise BadSample("a record needs `conversations` or `messages`")
    key, role_key, text_key = (
        ("conversations", "from", "value") if "conversations" in record else ("messages", "role", "content")
    )
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise BadSample(f"`{key}` must be a list of turns, got {turns!r:.60}")

    contents = []
    for turn in turns:
        role = ROLES.get(str(turn.get(role_key)).lower()) if isinstance(turn, dict) else None
        if role is None:
            raise BadSample(f"a turn needs `{role_key}`, one of {', '.join(ROLES)}; got {turn!r:.60}")
        content = turn.get(text_key)
        if isinstance(content, str) and role == "assistant":
            content = [{"type": "text", "text": content.strip()}]
        elif isinstance(content, str):
            content = split_tags(content)
        contents.append((role, check_parts(content, text_key)))
    return contents


def listed_media(record: dict, kind: str) -> list:
    """The images or videos of a record, which may name one or a list, in the singular or the plural."""
    value = record.get(kind) or record.get(f"{kind}s") or []
    return list(value) if isinstance(value, list) else [value]


def tags_differ(kind: str, tags: int, media: int) -> str:
    """What is wrong with a record, in the singular where there is one."""
    found = f"the text has {tags} <{kind}> tag{'s' * (tags != 1)}, the record {media} {kind}{'s' * (media != 1)}"
    return f"{found}: put <{kind}> where {'it belongs' if media == 1 else 'each belongs'}" if tags < media else found


def split_tags(text: str) -> list[dict]:
    """Parts of a text at its tags; a tag becomes a part without a path."""
    parts = []
    for piece in TAG.split(text):
        if TAG.fullmatch(piece):
            parts.append({"type": piece[1:-1]})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def check_parts(content, name: str) -> list[dict]:
    """Copies of the parts of a message, without white space at its ends."""
    if not isinstance(content, list):
        raise BadSample(f"`{name}` of a turn must be a text or a list of parts, got {content!r:.60}")
    parts = []
    for part in content:
        part = without_url(part)
        if not isinstance(part, dict) or part.get("type") not in ("text", *MEDIA):
            raise BadSample(f"a part needs a type, one of text, image, video; got {part!r:.60}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise BadSample(f"a text part needs `text`, got {part!r:.60}")
        parts.append(dict(part))
    for i, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and parts[i]["type"] == "text":
            parts[i]["text"] = strip(parts[i]["text"])
    return parts


def without_url(part):
    """A part of OpenAI's form, {"type": "video_url", "video_url": {"url"}}, as {"type": "video", "video"}."""
    if not isinstance(part, dict) or part.get("type") not in [f"{kind}_url" for kind in MEDIA]:
        return part
    kind = part["type"].removesuffix("_url")
    given = part.get(part["type"])
    given = given if isinstance(given, dict) else {"url": given}
    settings = {key: value for key, value in {**part, **given}.items() if key not in ("type", part["type"], "url")}
    return {**settings, "type": kind, kind: given.get("url")}


def media_parts(messages: Iterable[dict]) -> list[dict]:
    return [part for message in messages for part in message["content"] if part["type"] in MEDIA]


def resolve(path, root: Path, source: str | None, beside: Sequence[Media] = ()):
    """Absolute form of a path, or of each of a list of frames; URLs stay, and so do `Media`, found by their names."""
    if isinstance(path, list) and path:
        return [resolve(frame, root, source, beside) for frame in path]
    if isinstance(path, Media):
        return path
    if not isinstance(path, str) or not path:
        raise BadSample(f"a path must be a text, got {path!r:.60}")
    if path.startswith(("http://", "https://", "data:")):
        return path
    plain = unquote(path.removeprefix("file://")) if path.startswith("file://") else path
    name = re.split(r"[\\/]", plain)[-1]
    if found := next((media for media in beside if media.name == name), None):
        return found
    folders = [root, *([root / source] if isinstance(source, str) else [])]
    for folder in folders:
        for written in dict.fromkeys((plain, plain.replace("\\", "/"))):  # as on Windows
            if (folder / written).is_file():
                return str(folder / written)
    raise BadSample(f"missing file: {path} (in {' and '.join(map(str, folders))})")


def count_tokens(part: dict, processor, frames: tuple[int, int] | None) -> tuple[int, int]:
    """The most tokens that the processor will make of an image or video, and those of them that are vision, told by its
    header; 0 for a URL."""
    kind, path = part["type"], part[part["type"]]
    if isinstance(path, str) and "://" in path or str(path).startswith("data:"):
        return 0, 0
    try:
        if kind == "image":
            width, height = image_size(path)
            patches = processor.image_processor.get_number_of_image_patches(height, width, {})
            tokens = patches // processor.image_processor.merge_size**2
            return tokens, tokens
        settings = {CLIP_KEYS[key]: value for key, value in part.items() if key in CLIP_KEYS and value is not None}
        plan = processor.video_processor.plan(frame_images(path) or video_header(path), **settings)
    except (OSError, ValueError, av.FFmpegError, SyntaxError) as error:  # SyntaxError: a broken PNG
        where = f"{path}: " if isinstance(path, Media) else ""
        raise BadSample(f"broken {kind}: {where}{error}") from None
    if frames and not frames[0] <= plan.num_frames <= frames[1]:
        raise Unwanted(f"outside --clip_frames: {plan.num_frames} frames, of {frames[0]} to {frames[1]}: {path}")
    return plan.prompt_tokens, plan.tokens


def frame_images(video) -> list | None:
    """The frames of a video that is given as a list of images, in a form that the processor plans for."""
    if not isinstance(video, list):
        return None
    return [as_image(frame) if isinstance(frame, Media) else frame for frame in video]


def answer_spans(ids: Sequence[int], tokenizer) -> list[tuple[int, int]]:
    """Where the assistant turns stand among the tokens of a conversation: [first, last + 1), <|im_end|> included."""
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spans, i = [], 0
    while i + len(header) <= len(ids):
        if ids[i] == header[0] and list(ids[i : i + len(header)]) == header:
            first = last = i + len(header)
            while last < len(ids) and ids[last] != end:
                last += 1
            if last < len(ids):
                spans.append((first, last + 1))
            i = last
        i += 1
    return spans


def make_labels(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """int64 [length]: the tokens of assistant turns, and IGNORED elsewhere."""
    labels = torch.full_like(input_ids, IGNORED)
    for first, last in answer_spans(input_ids.tolist(), tokenizer):
        labels[first:last] = input_ids[first:last]
    return labels


def plan_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of samples that fit together into `capacity` tokens: the longest first, each where it leaves least."""
    packs, room = [], []  # room: (tokens left, pack), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = bisect.bisect_left(room, (lengths[i], 0))
        left, pack = room.pop(k) if k < len(room) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        bisect.insort(room, (left - lengths[i], pack))
    return packs


class ConversationDataset(torch.utils.data.Dataset):
    """Samples as model inputs. An item is a list of features: one, or with `capacity` a pack of several.

    Features are tensors: `input_ids` and `labels` [length], and what the processor makes of the media.

    A sample that cannot be read after all is left out, with a line of JSON in the file `skipped` and a warning; if
    none of an item is left, the next item takes its place. Which one that is depends on the index alone.

    For a loss in which every sample counts once, `multiple` is the number of items that all processes take at a time:
    the dataset is filled up to a multiple of it, since processes would get items twice. Items that fill it, or take the
    place of others, have no labels.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor,
        *,
        max_length: int,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        skipped: str | Path | None = None,
        multiple: int | None = None,
    ):
        if not samples:
            raise ValueError("no sample is left to train on")
        self.samples, self.processor, self.max_length, self.dtype = samples, processor, max_length, dtype
        self.skipped = None if skipped is None else Path(skipped)
        self.items = [[i] for i in range(len(samples))]
        self.capacity, self.multiple = capacity, multiple
        if capacity:
            self.items = plan_packs([sample.tokens for sample in samples], capacity)

    def __len__(self) -> int:
        return math.ceil(len(self.items) / (self.multiple or 1)) * (self.multiple or 1)

    def lengths(self) -> list[int]:
        """The tokens of each item, as estimated from the headers of its media."""
        return [sum(self.samples[i].tokens for i in item) for item in self.items]

    def __getitem__(self, index: int) -> list[dict[str, torch.Tensor]]:
        ignore_signals()
        for step in range(min(len(self.items), MOST_FAILURES)):
            features, room = [], self.capacity or self.max_length
            for i in self.items[(index + step) % len(self.items)]:
                try:
                    feature = self.encode(self.samples[i])
                    if len(feature["input_ids"]) > room:
                        raise BadSample(f"too long: {len(feature['input_ids']):,} tokens, of {room:,} that are left")
                except Exception as error:  # noqa: BLE001  whatever a file does must not end the training
                    self.skip(self.samples[i], error)
                    continue
                room -= len(feature["input_ids"])
                features.append(feature)
            if features and self.multiple and (step or index >= len(self.items)):
                return [{**feature, "labels": torch.full_like(feature["labels"], IGNORED)} for feature in features]
            if features:
                return features
        where = self.skipped or "the warnings above"
        raise RuntimeError(f"none of {step + 1} samples in a row could be read; the reasons are in {where}")

    def encode(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Decode and tokenise one sample."""
        inputs = self.processor.apply_chat_template(
            open_media(sample.messages), tokenize=True, return_dict=True, return_tensors="pt"
        )
        feature = {"input_ids": inputs["input_ids"][0]}
        feature["labels"] = make_labels(feature["input_ids"], self.processor.tokenizer)
        for name in MODEL_INPUTS:
            if name in inputs:
                feature[name] = torch.as_tensor(inputs[name])
                if name.startswith("pixel"):
                    feature[name] = feature[name].to(self.dtype)
        return feature

    def skip(self, sample: Sample, error: Exception) -> None:
        reason = str(error) if isinstance(error, BadSample) else f"{type(error).__name__}: {error}"
        logger.warning("skipped %s: %s", sample.id, reason)
        if self.skipped:
            # Only the first machine of several has made the folder.
            self.skipped.parent.mkdir(parents=True, exist_ok=True)
            with self.skipped.open("a") as file:
                file.write(json.dumps({"id": sample.id, "reason": reason}) + "\n")


MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


@dataclass
class Collator:
    """Makes a batch of items of `ConversationDataset`.

    Padded: `input_ids`, `labels`, `attention_mask` [samples, length], padding on the right. Packed: `input_ids`,
    `labels` [1, length] of all samples one after another, and their `lengths` [samples], from which `packed_positions`
    makes the positions that keep them apart.

    With `always_vision`, a batch without image or without video gets one of a single token behind its last sample,
    where no token sees it: then every process of a data-parallel training runs the same modules the same number of
    times, which FSDP, ZeRO-3 and DDP need so as not to wait for each other.
    """

    processor: object
    packed: bool = False
    always_vision: bool = False

    def __call__(self, items: Sequence[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        features = [dict(feature) for item in items for feature in item]
        if self.always_vision:
            self._add_vision(features)
        ids, labels = ([feature[name] for feature in features] for name in ("input_ids", "labels"))
        if self.packed:
            batch = {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None]}
            batch["lengths"] = torch.tensor([len(x) for x in ids])
        else:
            batch = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
                "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            }
        for name in MODEL_INPUTS:
            parts = [feature[name] for feature in features if name in feature]
            if parts:
                batch[name] = torch.cat(parts)
        return batch

    def _add_vision(self, features: list[dict[str, torch.Tensor]]) -> None:
        last = features[-1]
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if any(grid in feature for feature in features):
                continue
            part = getattr(self.processor, f"{kind}_processor")
            merge = part.merge_size
            token = getattr(self.processor, f"{kind}_token_id")
            last["input_ids"] = torch.cat([last["input_ids"], torch.tensor([token])])
            last["labels"] = torch.cat([last["labels"], torch.tensor([IGNORED])])
            dtype = next((f[name] for f in features for name in f if name.startswith("pixel")), torch.zeros(())).dtype
            last[pixels] = torch.zeros(merge**2, 3 * part.temporal_patch_size * part.patch_size**2, dtype=dtype)
            last[grid] = torch.tensor([[1, merge, merge]])
            if kind == "video" and "second_per_grid_ts" in self.processor.model_input_names:
                last["second_per_grid_ts"] = torch.ones(1)


def packed_positions(batch: dict[str, torch.Tensor], get_rope_index: Callable) -> torch.Tensor:
    """Positions [4, 1, length] of a packed batch: text positions, which start anew with each sample, then rotary ones.

    Args:
        batch: of a packed `Collator`.
        get_rope_index: of the model.
    """
    lengths = batch["lengths"].tolist()
    rows = pad_sequence(batch["input_ids"][0].split(lengths), batch_first=True)
    mask = pad_sequence([torch.ones(n, dtype=torch.long, device=rows.device) for n in lengths], batch_first=True)
    grids = {name: x for name, x in batch.items() if name in MODEL_INPUTS and not name.startswith("pixel")}
    rotary, _ = get_rope_index(rows, attention_mask=mask, **grids)
    text = torch.cat([torch.arange(n, device=rows.device) for n in lengths])
    return torch.cat([text[None], rotary[:, mask.bool()]])[:, None]
