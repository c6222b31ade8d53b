"""What the page of `app.py` does, without the page: visitors, their videos and their conversations."""

import io
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image

from videonsa import video_reader, video_source
from videonsa.video_chat import Conversation, VideoChat
from videonsa.video_inputs import file_metadata

from . import preview
from .loading import CLIP, UNSEEN
from .needles import make_sample
from .progress import Forecast
from .times import clock, duration
from .transcript import Turn, as_messages
from .waiting import Line

QUESTIONS = ("What happens in this video?", "Describe it in one sentence.", "What is shown at the end?")
MAX_QUESTION = 2000  # characters
EXAMPLES = (1, 2, 3)  # seeds of clips
MEASURED = 32  # videos, at most, on which a forecast rests


@dataclass
class Limits:
    """What visitors may ask for: megabytes and seconds of a video, tokens of a prompt and of an answer, visitors whose
    video is kept, questions that wait, seconds for a server to answer, and seconds for which the video of a closed page
    is kept, which may have been loaded again."""

    megabytes: int = 500
    seconds: float = 3600
    tokens: int = 128 * 1024
    new_tokens: int = 512
    visitors: int = 4
    queue: int = 20
    timeout: float = 30
    linger: float = 60


@dataclass
class Visitor:
    """An open page: its video, all of whose frames `metadata` lists, and the conversation about it.

    Attributes:
        shown: the file that the page plays; None if a copy that browsers can play is still to be made.
        settings: with which the conversation reads the video.
        turns: all that was said about the video, also what the conversation, begun later, does not remember.
        values: of the settings on the page, when last used.
        notice: what the visitor who has asked should know now.
    """

    path: Path | None = None
    metadata: object = None
    shown: Path | None = None
    truth: str = ""  # what is true of an example clip
    questions: tuple[str, ...] = QUESTIONS
    conversation: Conversation | None = None
    settings: dict = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    notice: str = ""
    values: tuple = ()
    busy: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    seen: float = field(default_factory=time.monotonic)


class App:
    """What the page does, without the page. Its methods raise ValueError with what a visitor should read.

    Args:
        files: the folder where all videos lie.
        examples: whether the model knows the clips of `make_needle_videos.py`.
    """

    def __init__(self, chat: VideoChat, files: Path, limits: Limits | None = None, examples: bool = False):
        self.chat, self.files, self.limits, self.examples = chat, Path(files).resolve(), limits or Limits(), examples
        self.files.mkdir(parents=True, exist_ok=True)
        self.visitors: dict[str, Visitor] = {}
        self.crowded_out = deque(maxlen=1000)
        self.lock = threading.Lock()
        self.line = Line(self.limits.queue)
        self.forecast = Forecast()  # of the seconds to the first token
        self.speaking = 0.0  # seconds of the last answer, from its first token to its last
        video_source.MAX_DOWNLOAD = self.limits.megabytes * 10**6

    def take(self, visitor: str, path: str | Path, truth: str = "", questions: tuple[str, ...] = QUESTIONS) -> None:
        """Make an uploaded file the visitor's video, in place of another."""
        path = Path(path).resolve()
        if not path.is_relative_to(self.files) or not path.is_file():
            raise ValueError("This file was not uploaded here.")
        try:
            if path.stat().st_size > self.limits.megabytes * 10**6:
                raise ValueError(f"The file is larger than {self.limits.megabytes:,} MB, the limit.")
            with video_reader.VideoFile(str(path), max_seconds=self.limits.seconds) as file:
                metadata = replace(file_metadata(file), frame_times=file.times.tolist())
            shown = path if preview.is_playable(path) else None
        except (OSError, ValueError) as error:
            self._remove(path)
            raise ValueError(str(error).replace(str(path), path.name)) from error
        if self.visitors.get(visitor, Visitor()).path != path:
            self.leave(visitor)
        with self.lock:
            self.visitors[visitor] = Visitor(path, metadata, shown, truth, questions)
            idle = sorted((v.seen, name) for name, v in self.visitors.items() if not v.busy and name != visitor)
            crowd = [name for _, name in idle[: max(len(self.visitors) - self.limits.visitors, 0)]]
        for name in crowd:
            self.leave(name)
            self.crowded_out.append(name)

    def fetch(self, visitor: str, url: str) -> Path:
        """Download the visitor's video."""
        url = (url or "").strip()
        if not re.match(r"https?://[^/]", url, re.IGNORECASE):
            raise ValueError("An address must begin with http:// or https://.")
        name = re.sub(r"[^\w.-]+", "_", Path(unquote(urlsplit(url).path)).name).lstrip(".")[-100:] or "video.mp4"
        with video_source.download(url, urlsplit(url).hostname or name, self.limits.timeout, keep=False) as source:
            source.seek(0)
            path = Path(tempfile.mkdtemp(dir=self.files)) / name
            with path.open("wb") as file:
                shutil.copyfileobj(source, file)
        self.take(visitor, path)
        return path

    def make_example(self, visitor: str, seed: int | None = None) -> Path:
        """A clip that nobody has seen, with questions about it, as the visitor's video."""
        folder = Path(tempfile.mkdtemp(dir=self.files))
        seed = secrets.randbits(16) if seed is None else seed
        sample = make_sample(folder / "clip", CLIP, (seed, UNSEEN, 0))
        needle = sample["needles"][0]
        start, end = needle["seconds"][0]
        truth = f"{needle['colour']} {needle['shape']}, {needle['where']}, from {clock(start)} to {clock(end)}"
        self.take(visitor, sample["video"], truth, tuple(item["question"] for item in sample["questions"]))
        return Path(sample["video"])

    def make_preview(self, visitor: str) -> Iterator[float]:
        """Make a copy of the visitor's video that browsers can play; yields which share of it is done."""
        found = self._visitor(visitor)
        copy = found.path.with_name(f"{found.path.name}.preview.mp4")
        unfinished = copy.with_suffix(f".{secrets.token_hex(4)}")
        try:
            for share in preview.convert(found.path, unfinished, self.limits.seconds):
                if self.visitors.get(visitor) is not found:
                    return
                yield share
            unfinished.replace(copy)
            found.shown = copy
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(found.path), found.path.name)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def example_clips(self, seeds: tuple[int, ...] = EXAMPLES) -> list[tuple[int, bytes]]:
        """(seed, JPEG of what is to be found in it) of each of a few clips that `make_example` makes."""
        clips = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in seeds:
                sample = make_sample(Path(folder) / f"{seed}", CLIP, (seed, UNSEEN, 0))
                middle = sum(sample["needles"][0]["seconds"][0]) / 2
                with video_reader.VideoFile(sample["video"]) as file:
                    i = min(int(np.searchsorted(file.times, middle)), len(file) - 1)
                    picture = Image.fromarray(file.read([i], 168, 168)[0].permute(1, 2, 0).numpy())
                picture.save(data := io.BytesIO(), "JPEG", quality=85)
                clips.append((seed, data.getvalue()))
        return clips

    def plan(self, visitor: str, **settings) -> dict[str, str]:
        """What a question would read of the visitor's video: a few words on each of its aspects."""
        found = self._visitor(visitor)
        settings, whole = self._settings(settings), found.metadata.duration
        plan = self.chat.processor.video_processor.plan(found.metadata, **settings)
        cache, pixels = self.chat.memory(plan)
        wait = f"; {self._wait(plan.prompt_tokens)} to the first word" if self.forecast.measured else ""
        return {
            "Frames": f"{plan.num_frames:,} of {plan.width} × {plan.height}, {plan.fps:.3g} per second",
            "Tokens": f"{plan.prompt_tokens:,} of {plan.budget:,}",
            "Time": f"{clock(plan.start)} to {clock(plan.end)} of {clock(whole)}{wait}",
            "Memory": f"{size(cache)} of cache, {size(pixels)} of pixels",
            "Attention": f"{self.chat.model.config.attention_budget(plan.tokens):.1%} of the pairs of dense attention",
        }

    def forgets(self, visitor: str, **settings) -> bool:
        """Whether a question with these settings begins a new conversation, though there is one."""
        found = self._visitor(visitor)
        return bool(found.turns) and self._opens(found, self._settings(settings))

    def ask(self, visitor: str, question: str, new_tokens: int = 128, **settings) -> Iterator[list[dict[str, str]]]:
        """Yield the conversation with the answer so far, as `messages`, and `Visitor.notice` each time.

        Settings other than those of the last question begin a new conversation below the last one.

        Raises:
            ValueError: also if there is no video, or a setting, the question or the conversation exceeds a limit.
        """
        found, question = self._visitor(visitor), (question or "").strip()
        settings, limits = self._settings(settings), self.limits
        if not question:
            raise ValueError("Type a question first.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question):,} characters, the limit is {MAX_QUESTION:,}.")
        if not 1 <= new_tokens <= limits.new_tokens:
            raise ValueError(f"An answer may have 1 to {limits.new_tokens} tokens, got {new_tokens}.")
        opens = self._opens(found, settings)
        if not opens and len(found.conversation.ids) + new_tokens > limits.tokens:
            raise ValueError(f"The conversation has reached {limits.tokens:,} tokens, the limit. Start a new one.")

        found.busy, found.seen, stop = True, time.monotonic(), found.stop
        place = None
        try:
            reading = self._reading_seconds(found, settings) if opens else 0.0
            place = self.line.join(None if reading is None else reading + self.speaking)
            turn = Turn(question, settings=settings, remembered=0 if opens else len(found.conversation.ids))
            while not place.turn.wait(0.5) and not stop.is_set():
                found.notice = self.line.describe(place)
                yield as_messages(found.turns, turn)
            if not place.turn.is_set():
                found.notice = "Stopped while waiting."
                yield as_messages(found.turns)
                return
            yield from self._answer(found, turn, int(new_tokens), reading, stop)
        except torch.OutOfMemoryError as error:
            raise ValueError("There is not enough memory for so many tokens. Allow fewer and ask again.") from error
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(found.path), found.path.name)) from error
        finally:
            if place is not None:
                self.line.leave(place)
            found.busy, found.seen = False, time.monotonic()

    def _answer(self, found: Visitor, turn: Turn, new_tokens: int, reading: float | None, stop) -> Iterator[list]:
        found.notice = ""
        if self._opens(found, turn.settings):
            found.conversation, found.settings = self.chat.open(str(found.path), **turn.settings), turn.settings
        conversation = found.conversation
        if conversation.cache is None:
            found.notice = f"Reading the video, about {reading:.0f} s…" if reading else "Reading the video…"
        yield as_messages(found.turns, turn)
        try:
            for piece in conversation.stream(turn.question, max_new_tokens=new_tokens, stop=stop):
                turn.answer += piece
                found.notice = "Stopping…" if stop.is_set() else ""
                yield as_messages(found.turns, turn)
        except GeneratorExit:
            # The page is gone: what was said is kept, and the model, which is still ending it, begins anew.
            found.conversation = None if found.conversation is conversation else found.conversation
            if turn.answer:
                found.turns.append(turn)
            raise
        except (OSError, ValueError):
            found.conversation = None  # the video is out of it
            raise

        answer = conversation.answer
        if answer is None:
            found.notice = "Stopped before the first word."
        else:
            found.notice = ""
            turn.moments = [(moment.seconds, moment.share) for moment in answer.moments]
            found.turns.append(turn)
        if timing := answer is not None and answer.timing:
            self.speaking = (timing["tokens"] - 1) / max(timing["speed"], 1e-9)
            if not timing["cached"]:
                self.forecast.add(timing["given"], timing["reading"] + timing["first"])
                del self.forecast.measured[:-MEASURED]
        yield as_messages(found.turns)

    def retract(self, visitor: str) -> str:
        """Forget the last question and its answer; returns the question."""
        found = self._visitor(visitor)
        if found.busy or not found.turns:
            raise ValueError("There is no answer to try again.")
        if found.conversation is not None and found.conversation.messages:
            found.conversation.undo()
        return found.turns.pop().question

    def begin(self, visitor: str) -> None:
        """Let the visitor's next question be answered, whatever was stopped before."""
        if visitor in self.visitors:
            self.visitors[visitor].stop = threading.Event()

    def stop(self, visitor: str) -> None:
        """End the answer that is being given to the visitor, or waits to be."""
        if visitor in self.visitors:
            self.visitors[visitor].stop.set()

    def forget(self, visitor: str) -> None:
        """Start a new conversation about the same video."""
        if visitor in self.visitors:
            self.visitors[visitor].conversation = None
            self.visitors[visitor].turns = []

    def part(self, visitor: str) -> None:
        """Stop answering the visitor, whose page was closed or is loaded again, and leave after a while."""
        if visitor in self.visitors:
            self.stop(visitor)
            timer = threading.Timer(self.limits.linger, self.leave, [visitor])
            timer.daemon = True
            timer.start()

    def rejoin(self, visitor: str, former: str) -> Visitor | None:
        """Give a visitor what the visitor of a page that was closed has left, if anything."""
        with self.lock:
            found = self.visitors.pop(former, None)
            if found is not None:
                self.visitors[visitor] = found
                found.stop.set()
        return found

    def leave(self, visitor: str) -> None:
        """Stop answering the visitor and remove the video."""
        with self.lock:
            gone = self.visitors.pop(visitor, None)
            # The same file uploaded twice is stored once.
            if gone is None or any(other.path == gone.path for other in self.visitors.values()):
                return
        gone.stop.set()
        self._remove(gone.path)

    def messages(self, visitor: str) -> list[dict[str, str]]:
        """All that was said about the visitor's video, in words."""
        return as_messages(self.visitors.get(visitor, Visitor()).turns)

    def _visitor(self, visitor: str) -> Visitor:
        if visitor not in self.visitors:
            lost = " Yours made room for one of a later visitor." if visitor in self.crowded_out else ""
            raise ValueError(f"Choose a video first.{lost}")
        return self.visitors[visitor]

    def _settings(self, settings: dict) -> dict:
        settings = {name: value for name, value in settings.items() if value is not None}
        settings |= {name: int(settings[name]) for name in ("max_pixels", "max_tokens") if name in settings}
        if settings.get("max_tokens", 0) > self.limits.tokens:
            raise ValueError(f"max_tokens may be {self.limits.tokens:,} at most, got {settings['max_tokens']:,}.")
        return {"max_tokens": self.limits.tokens, **settings, "max_duration": self.limits.seconds}

    def _opens(self, found: Visitor, settings: dict) -> bool:
        return found.conversation is None or found.settings != settings

    def _reading_seconds(self, found: Visitor, settings: dict) -> float | None:
        """What the next answer is expected to take until its first word."""
        plan = self.chat.processor.video_processor.plan(found.metadata, **settings)
        expected = self.forecast.between(plan.prompt_tokens)
        return None if expected is None else sum(expected) / 2

    def _wait(self, tokens: int) -> str:
        least, most = map(duration, self.forecast.between(tokens))
        return f"about {least}" if least == most else f"{least} to {most}"

    def _remove(self, path: Path) -> None:
        if path.parent.parent == self.files:
            shutil.rmtree(path.parent, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def size(count: float) -> str:
    """Bytes, for people."""
    return next(
        f"{count / 1000**i:.3g} {unit}" for i, unit in ((3, "GB"), (2, "MB"), (1, "kB")) if count >= 1000**i or i == 1
    )
