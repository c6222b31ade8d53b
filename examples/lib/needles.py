"""Clips in which coloured shapes flash up at known times, with questions: what `make_needle_videos.py` makes."""

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from .folders import check_new, new_folder

SPLITS = ("train", "validation", "test")
COLOURS = {
    "red": (230, 30, 30),
    "orange": (250, 140, 10),
    "yellow": (250, 235, 20),
    "green": (30, 190, 40),
    "cyan": (20, 215, 225),
    "blue": (30, 60, 235),
    "purple": (140, 30, 200),
    "pink": (250, 90, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")
# Centre as (x, y) shares of the frame.
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
TIMES = ("start", "middle", "end")  # thirds of the clip
COUNTS = ("once", "twice", "three times")
QUESTIONS = ("colour", "shape", "where", "when", "count", "first", "describe")
GAP = 0.5  # seconds at least between two flashes


@dataclass(frozen=True)
class Settings:
    """What clips are made of; the command-line options of the same names."""

    seconds: tuple[float, ...] = (4.0,)
    fps: float = 4
    size: int = 112
    needles: tuple[int, ...] = (1,)
    repeats: float = 0.0
    depth: float | None = None
    needle_seconds: tuple[float, float] = (0.5, 1.0)
    needle_size: tuple[float, float] = (0.36, 0.5)
    distractors: tuple[int, int] = (1, 3)
    stills: float = 0.0
    questions: tuple[str, ...] = QUESTIONS[:-1]
    turns: int = 8

    def __post_init__(self):
        def require(condition, name, allowed):
            if not condition:
                raise ValueError(f"--{name} must be {allowed}, got {getattr(self, name)}")

        require(self.fps > 0, "fps", "positive")
        require(all(s * self.fps >= 1 for s in self.seconds), "seconds", "at least one frame long")
        require(self.size >= 32 and self.size % 2 == 0, "size", "an even number of at least 32")
        require(all(1 <= n <= len(SHAPES) for n in self.needles), "needles", f"1 to {len(SHAPES)}")
        require(0 <= self.repeats <= 1, "repeats", "from 0 to 1")
        require(0 <= self.stills <= 1, "stills", "from 0 to 1")
        require(self.depth is None or 0 <= self.depth <= 1, "depth", "from 0 to 1")
        several = max(self.needles) > 1 or self.repeats > 0
        require(self.depth is None or not several, "depth", "left out where clips have several needles or repeats")
        require(0 < self.needle_seconds[0] <= self.needle_seconds[1], "needle_seconds", "positive and ascending")
        require(0 < self.needle_size[0] <= self.needle_size[1] <= 0.5, "needle_size", "ascending, at most 0.5")
        require(0 <= self.distractors[0] <= self.distractors[1], "distractors", "ascending")
        require(set(self.questions) <= set(QUESTIONS) and self.questions, "questions", f"among {', '.join(QUESTIONS)}")
        never = {"count": self.repeats == 0, "first": max(self.needles) == 1}
        possible = "such that clips have some: count needs --repeats, first needs two --needles"
        require(not all(never.get(kind) for kind in self.questions), "questions", possible)
        require(self.turns >= 1, "turns", "at least 1")


@dataclass
class Needle:
    """A shape and the frames [first, last + 1) of each of its flashes, ascending."""

    colour: str
    shape: str
    where: str
    flashes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def make_sample(path: Path, settings: Settings, seed: tuple[int, int, int]) -> dict:
    """Write the clip (`path` + ".mp4") or still (+ ".png") of this seed and return its sample.

    The sample has `video` or `image` (the path), `seconds`, `needles` (what is true) and `questions`: a list of
    {"type", "question", "answer"}.
    """
    rng = np.random.default_rng(seed)
    still = bool(rng.random() < settings.stills)
    frames = 1 if still else max(1, round(float(rng.choice(settings.seconds)) * settings.fps))
    needles = place_needles(rng, frames, settings)
    pictures = render(rng, frames, needles, settings)
    if still:
        path = path.with_suffix(".png")
        Image.fromarray(next(pictures)).save(path)
    else:
        path = path.with_suffix(".mp4")
        encode(path, pictures, settings)
    return {
        "image" if still else "video": str(path),
        "seconds": frames / settings.fps,
        "needles": [
            {
                "colour": needle.colour,
                "shape": needle.shape,
                "where": needle.where,
                "seconds": [[first / settings.fps, last / settings.fps] for first, last in needle.flashes],
            }
            for needle in needles
        ],
        "questions": ask(rng, needles, frames, settings),
    }


def place_needles(rng, frames: int, settings: Settings) -> list[Needle]:
    """Needles of different colours and shapes, in the order of their first flash; no two flashes overlap.

    Each flash lies at `settings.depth`, or else within one third of the clip where it can, each third being as likely.
    A clip that is too short for all needles gets fewer.
    """
    wanted = int(rng.choice(settings.needles))
    colours = rng.permutation(list(COLOURS))[:wanted].tolist()
    shapes = rng.permutation(SHAPES)[:wanted].tolist()
    places = rng.choice(list(PLACES), wanted).tolist()
    needles = [Needle(*needle) for needle in zip(colours, shapes, places, strict=True)]
    gap = max(1, round(GAP * settings.fps))
    taken = []
    for needle in needles:
        repeats = int(rng.integers(2, len(COUNTS) + 1)) if rng.random() < settings.repeats else 1
        for _ in range(repeats):
            for _ in range(50):  # until it fits
                length = max(1, round(float(rng.uniform(*settings.needle_seconds)) * settings.fps))
                length = min(length, frames)
                low, high = thirds(frames)[rng.integers(3)]
                if high - low < length:
                    low, high = 0, frames
                first = int(rng.integers(low, high - length + 1))
                if settings.depth is not None:
                    first = round(settings.depth * (frames - length))
                if all(first >= last + gap or first + length + gap <= start for start, last in taken):
                    needle.flashes.append((first, first + length))
                    taken.append(needle.flashes[-1])
                    break
        needle.flashes.sort()
    return sorted((needle for needle in needles if needle.flashes), key=lambda needle: needle.flashes[0])


def thirds(frames: int) -> list[tuple[int, int]]:
    """Whole frames [low, high) of the start, the middle and the end of a clip."""
    return [(-(-frames * i // 3), frames * (i + 1) // 3) for i in range(3)]


def ask(rng, needles: list[Needle], frames: int, settings: Settings) -> list[dict]:
    """Questions of the types in `settings.questions` that have one answer, in random order, at most `turns`."""
    asked = []

    def add(kind, question, answer):
        if kind in settings.questions:
            asked.append({"type": kind, "question": question, "answer": answer})

    for needle in needles:
        add("colour", f"What colour was the {needle.shape}?", needle.colour)
        add("shape", f"What shape was {needle.colour}?", needle.shape)
        add("where", f"Where was the {needle.name}?", needle.where)
        first, last = needle.flashes[0]
        inside = [low <= first and last <= high for low, high in thirds(frames)]
        if len(needle.flashes) == 1 and any(inside):
            add("when", f"When did the {needle.name} appear?", TIMES[inside.index(True)])
        if settings.repeats:
            add("count", f"How often did the {needle.name} appear?", COUNTS[len(needle.flashes) - 1])
    for pair in itertools.combinations(needles, 2):
        if all(len(needle.flashes) == 1 for needle in pair):
            one, other = (pair[i].name for i in rng.permutation(2))
            add("first", f"Which came first, the {one} or the {other}?", pair[0].name)
    add("describe", "What appeared?", ", ".join(f"{needle.name} {needle.where}" for needle in needles))
    return [asked[i] for i in rng.permutation(len(asked))[: settings.turns]]


def render(rng, frames: int, needles: list[Needle], settings: Settings) -> Iterator[np.ndarray]:
    """The frames, uint8 [size, size, 3]."""
    size = settings.size
    stamps = []
    for needle in needles:
        mask = shape_mask(needle.shape, round(size * float(rng.uniform(*settings.needle_size))), rng.uniform(-10, 10))
        for flash in needle.flashes:
            centre = np.array(PLACES[needle.where]) + rng.uniform(-0.02, 0.02, 2)
            drift = rng.uniform(-0.04, 0.04, 2)  # over the whole flash
            stamps.append((flash, mask, np.array(COLOURS[needle.colour], np.float32), centre, drift))
    cut = 0
    for t in range(frames):
        if t == cut:
            texture = make_texture(rng, size)
            speed, corner = rng.uniform(-size / 8, size / 8, 2) / settings.fps, rng.uniform(0, size, 2)
            blobs = make_blobs(rng, settings)
            start, cut = t, t + max(1, round(float(rng.uniform(6, 20)) * settings.fps))
        y, x = (corner + speed * (t - start)).round().astype(int) % size
        picture = texture[y : y + size, x : x + size].astype(np.float32)
        for mask, grey, centre, motion in blobs:
            stamp(picture, mask, grey, centre + motion * (t - start) / settings.fps, wrap=True)
        for (first, last), mask, colour, centre, drift in stamps:
            if first <= t < last:
                stamp(picture, mask, colour, centre + drift * (t - first) / (last - first))
        yield picture.round().astype(np.uint8)


def stamp(picture: np.ndarray, mask: np.ndarray, colour, centre, wrap: bool = False) -> None:
    """Blend `colour` into `picture` under a mask [m, m] whose centre is given in shares of the frame."""
    size, m = len(picture), len(mask)
    if wrap:  # in from the other side, all the way out before
        centre = (np.asarray(centre) * size + m) % (size + 2 * m) / size - m / size
    x, y = (np.asarray(centre) * size - m / 2).round().astype(int)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + m, size), min(x + m, size)
    if top < bottom and left < right:
        alpha = mask[top - y : bottom - y, left - x : right - x, None]
        part = picture[top:bottom, left:right]
        part += alpha * (colour - part)


def make_texture(rng, size: int) -> np.ndarray:
    """uint8 [2 size, 2 size, 3]: a muted texture that repeats after `size`, so that any crop of it may drift on."""
    axis = np.arange(size, dtype=np.float32) * (2 * np.pi / size)
    y, x = axis[:, None], axis[None]
    kind = rng.integers(4)
    if kind == 0:  # clouds
        values = sum(
            np.asarray(Image.fromarray(np.pad(rng.random((n, n), np.float32), (0, 1), "wrap")).resize((size, size)))
            for n in (2, 4, 8)
        )
    elif kind == 1:  # stripes
        a, b = rng.integers(-4, 5, 2)
        values = np.sin(a * x + b * y + (a == b == 0) * x)
    elif kind == 2:  # checker
        n = int(rng.integers(2, 7))
        values = np.sign(np.sin(n * x)) * np.sign(np.sin(n * y))
    else:  # plasma
        values = sum(np.sin(rng.integers(1, 4) * x + rng.integers(1, 4) * y + rng.uniform(0, 6)) for _ in range(3))
        values = values + np.sin(3 * np.sin(x) + rng.uniform(0, 6)) * np.cos(2 * np.sin(y))
    values = (values - values.min()) / max(np.ptp(values), 1e-6)
    # Two greys with a tint: needles alone are saturated.
    low, high = (rng.uniform(40, 215) + rng.uniform(-18, 18, 3) for _ in range(2))
    tile = (low + values[..., None] * (high - low)).clip(0, 255).astype(np.uint8)
    return np.tile(tile, (2, 2, 1))


def make_blobs(rng, settings: Settings) -> list:
    """Soft grey discs (mask, grey, centre, motion per second) that wander through a scene."""
    blobs = []
    for _ in range(rng.integers(settings.distractors[0], settings.distractors[1] + 1)):
        m = round(settings.size * rng.uniform(0.15, 0.4))
        distance = np.hypot(*np.meshgrid(*[np.linspace(-1, 1, m, dtype=np.float32)] * 2))
        mask = rng.uniform(0.5, 0.9) * np.clip(2 * (1 - distance), 0, 1)
        blobs.append((mask.astype(np.float32), rng.uniform(30, 225), rng.uniform(0, 1, 2), rng.uniform(-0.3, 0.3, 2)))
    return blobs


def shape_mask(shape: str, pixels: int, degrees: float) -> np.ndarray:
    """float32 [pixels, pixels] in 0 … 1 of a shape that fills the square, tilted a little."""
    image = draw_shape(shape).rotate(degrees, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((pixels, pixels), Image.Resampling.BOX), np.float32) / 255


@lru_cache
def draw_shape(shape: str, m: int = 256) -> Image.Image:
    image = Image.new("L", (m, m))
    draw = ImageDraw.Draw(image)

    def polygon(*points):
        draw.polygon([(m * (0.5 + 0.46 * x), m * (0.5 + 0.46 * y)) for x, y in points], fill=255)

    def disc(x, y, radius, fill):
        draw.ellipse([m * (0.5 + 0.46 * v) for v in (x - radius, y - radius, x + radius, y + radius)], fill=fill)

    if shape == "square":
        polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    elif shape == "triangle":
        polygon((0, -0.95), (0.95, 0.8), (-0.95, 0.8))
    elif shape == "diamond":
        polygon((0, -1), (0.65, 0), (0, 1), (-0.65, 0))
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.42, 1)
        polygon(*zip(radii * np.sin(angles), -radii * np.cos(angles), strict=True))
    elif shape == "cross":
        polygon((-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95))
        polygon((-0.95, -0.3), (-0.95, 0.3), (0.95, 0.3), (0.95, -0.3))
    else:
        disc(0, 0, 0.95, 255)
        if shape == "ring":
            disc(0, 0, 0.5, 0)
        elif shape == "moon":
            disc(0.45, -0.1, 0.75, 0)
    return image


def encode(path: Path, pictures: Iterator[np.ndarray], settings: Settings) -> None:
    """H.264 at constant quality; one thread, since clips are made side by side. Without macroblock-tree rate control,
    with which the same pictures give other bytes in other processes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(round(settings.fps * 1000), 1000))
        stream.width = stream.height = settings.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def conversation(sample: dict) -> dict:
    """A sample in the conversation format of the Qwen-VL fine-tuning code; `types` are those of the answers."""
    kind = "video" if "video" in sample else "image"
    turns = []
    for i, question in enumerate(sample["questions"]):
        tag = f"<{kind}>\n" if i == 0 else ""
        turns.append({"from": "human", "value": tag + question["question"]})
        turns.append({"from": "gpt", "value": question["answer"]})
    return {**about(sample), kind: sample[kind], "conversations": turns}


def messages(sample: dict) -> dict:
    """A sample as the `messages` of a chat."""
    kind = "video" if "video" in sample else "image"
    turns = []
    for i, question in enumerate(sample["questions"]):
        media = [{"type": kind, kind: sample[kind]}] if i == 0 else []
        turns.append({"role": "user", "content": [*media, {"type": "text", "text": question["question"]}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": question["answer"]}]})
    return {**about(sample), "messages": turns}


def about(sample: dict) -> dict:
    types = [question["type"] for question in sample["questions"]]
    return {**{name: sample[name] for name in ("id", "seed", "seconds", "needles")}, "types": types}


def make_clip(job) -> dict:
    folder, settings, seed, name = job
    sample = make_sample(Path(folder) / name, settings, seed)
    kind = "video" if "video" in sample else "image"
    return {**sample, "id": name, "seed": list(seed), kind: Path(sample[kind]).relative_to(folder).as_posix()}


def make_dataset(output: str | Path, counts: dict[str, int], settings: Settings, *, seed=0, workers=None) -> Path:
    """Write a data set to the folder `output`, which appears only when complete, and return it.

    A clip that happens to have no question of the types wanted is no sample.

    Args:
        output: folder to make.
        counts: clips of each of "train", "validation", "test".
        seed: of the whole set, 0 … 2³² − 1; each clip has [seed, split, index].
        workers: processes; default: one per CPU.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    output = check_new(output)
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {seed}")
    with new_folder(output) as partial:
        jobs = []
        for number, split in enumerate(SPLITS):
            if counts.get(split):
                (partial / split).mkdir()
            jobs += [(partial, settings, (seed, number, i), f"{split}/{i:06}") for i in range(counts.get(split, 0))]
        workers = min(workers or os.cpu_count() or 1, max(1, len(jobs)))
        context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
        with context.Pool(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            made = pool.imap(make_clip, jobs, chunksize=4) if workers > 1 else map(make_clip, jobs)
            samples = list(tqdm(made, total=len(jobs), unit="clip", disable=None))
        for split in SPLITS:
            if counts.get(split):
                part = [sample for sample in samples if sample["id"].startswith(f"{split}/") and sample["questions"]]
                (partial / f"{split}.json").write_text(json.dumps([conversation(s) for s in part], indent=1))
                (partial / f"{split}.jsonl").write_text("".join(json.dumps(messages(s)) + "\n" for s in part))
    return output
