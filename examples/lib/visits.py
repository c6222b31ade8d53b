"""What the page of `app.py` does, without the page: visitors, their videos and their conversations."""

import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from videonsa import video_reader, video_source
from videonsa.video_chat import Conversation, VideoChat
from videonsa.video_inputs import file_metadata

from .loading import CLIP, UNSEEN
from .needles import make_sample
from .progress import Forecast, clock

QUESTIONS = ("What happens in this video?", "Describe it in one sentence.", "What is shown at the end?")
MAX_QUESTION = 2000  # characters


@dataclass
class Limits:
    """What visitors may ask for: megabytes and seconds of a video, tokens of a prompt and of an answer, visitors whose
    video is kept, questions that wait, and seconds for a server to answer."""

    megabytes: int = 500
    seconds: float = 3600
    tokens: int = 128 * 1024
    new_tokens: int = 512
    visitors: int = 4
    queue: int = 20
    timeout: float = 30


@dataclass
class Visitor:
    """An open page: its video, all of whose frames `metadata` lists, and the conversation about it."""

    path: Path | None = None
    metadata: object = None
    truth: str = ""  # what is true of an example clip
    questions: tuple[str, ...] = QUESTIONS
    conversation: Conversation | None = None
    settings: dict = field(default_factory=dict)  # with which the conversation reads the video
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
        self.lock = threading.Lock()
        self.forecast = Forecast()  # of the seconds to the first token
        video_source.MAX_DOWNLOAD = self.limits.megabytes * 10**6

    def take(self, visitor: str, path: str | Path, truth: str = "", questions: tuple[str, ...] = QUESTIONS) -> None:
        """Make an uploaded file the visitor's video, in place of another."""
        path = Path(path).resolve()
        if not path.is_relative_to(self.files) or not path.is_file():
            raise ValueError("This file was not uploaded here.")
        if self.visitors.get(visitor, Visitor()).path != path:
            self.leave(visitor)
        try:
            if path.stat().st_size > self.limits.megabytes * 10**6:
                raise ValueError(f"The file is larger than {self.limits.megabytes:,} MB, the limit.")
            with video_reader.VideoFile(str(path), max_seconds=self.limits.seconds) as file:
                metadata = replace(file_metadata(file), frame_times=file.times.tolist())
        except (OSError, ValueError) as error:
            self._remove(path)
            raise ValueError(str(error).replace(str(path), path.name)) from error
        with self.lock:
            self.visitors[visitor] = Visitor(path, metadata, truth, questions)
            idle = sorted((v.seen, name) for name, v in self.visitors.items() if not v.busy and name != visitor)
            crowd = [name for _, name in idle[: max(len(self.visitors) - self.limits.visitors, 0)]]
        for name in crowd:
            self.leave(name)

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
        truth = f"{needle['colour']} {needle['shape']}, {needle['where']}, from {start:g} to {end:g} s"
        self.take(visitor, sample["video"], truth, tuple(item["question"] for item in sample["questions"]))
        return Path(sample["video"])

    def plan(self, visitor: str, **settings) -> dict[str, str]:
        """What a question would read of the visitor's video: a few words on each of its aspects."""
        found = self._visitor(visitor)
        settings, duration = self._settings(settings), found.metadata.duration
        plan = self.chat.processor.video_processor.plan(found.metadata, **settings)
        cache, pixels = self.chat.memory(plan)
        seconds = f"{plan.start:.1f} to {plan.end:.1f}"
        wait = f"; {self._wait(plan.tokens)} to the first word" if self.forecast.measured else ""
        return {
            "Frames": f"{plan.num_frames:,} of {plan.width} × {plan.height}, {plan.fps:.3g} per second",
            "Tokens": f"{plan.tokens:,} of {plan.budget:,}",
            "Seconds": f"{seconds} of {duration:.1f}{wait}",
            "Memory": f"{size(cache)} of cache, {size(pixels)} of pixels",
            "Attention": f"{self.chat.model.config.attention_budget(plan.tokens):.1%} of the pairs of dense attention",
        }

    def ask(self, visitor: str, question: str, new_tokens: int = 128, **settings) -> Iterator[list[dict[str, str]]]:
        """Yield the conversation with the answer so far, as `messages`. Other settings start a new conversation.

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
        conversation = found.conversation
        if conversation is None or found.settings != settings:
            conversation = self.chat.open(str(found.path), **settings)
        elif len(conversation.ids) + new_tokens > limits.tokens:
            raise ValueError(f"The conversation has reached {limits.tokens:,} tokens, the limit. Start a new one.")
        found.conversation, found.settings = conversation, settings
        found.busy, found.seen = True, time.monotonic()
        before, text = [*self.messages(visitor), {"role": "user", "content": question}], ""
        try:
            yield before
            for piece in conversation.stream(question, max_new_tokens=int(new_tokens), stop=found.stop):
                text += piece
                yield [*before, {"role": "assistant", "content": text}]
        except torch.OutOfMemoryError as error:
            raise ValueError("There is not enough memory for so many tokens. Allow fewer and ask again.") from error
        except (OSError, ValueError) as error:
            found.conversation = conversation if conversation.videos else None  # it drops those that cannot be read
            raise ValueError(str(error).replace(str(found.path), found.path.name)) from error
        finally:
            found.busy, found.seen = False, time.monotonic()
        answer = conversation.answer
        if answer is not None and not answer.timing["cached"]:
            timing = answer.timing
            self.forecast.add(timing["given"], timing["reading"] + timing["first"])

    def _wait(self, tokens: int) -> str:
        least, most = map(clock, self.forecast.between(tokens))
        return f"about {least}" if least == most else f"{least} to {most}"

    def stop(self, visitor: str) -> None:
        """End the answer that is being given to the visitor, or waits to be."""
        if visitor in self.visitors:
            self.visitors[visitor].stop.set()

    def forget(self, visitor: str) -> None:
        """Start a new conversation about the same video."""
        if visitor in self.visitors:
            self.visitors[visitor].conversation = None

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
        """The conversation so far, in words."""
        conversation = getattr(self.visitors.get(visitor), "conversation", None)
        turns = conversation.messages if conversation else []
        return [{"role": turn["role"], "content": turn["content"][-1]["text"]} for turn in turns]

    def _visitor(self, visitor: str) -> Visitor:
        if visitor not in self.visitors:
            raise ValueError("Choose a video first. (Videos of earlier visitors make room for those of later ones.)")
        return self.visitors[visitor]

    def _settings(self, settings: dict) -> dict:
        settings = {name: value for name, value in settings.items() if value is not None}
        settings |= {name: int(settings[name]) for name in ("max_pixels", "max_tokens") if name in settings}
        if settings.get("max_tokens", 0) > self.limits.tokens:
            raise ValueError(f"max_tokens may be {self.limits.tokens:,} at most, got {settings['max_tokens']:,}.")
        return {"max_tokens": self.limits.tokens, **settings, "max_duration": self.limits.seconds}

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
