"""Answers on a ZeroGPU Space, which lends a GPU to a function while it runs, in a process of its own."""

import os
import threading
from collections.abc import Iterator

from videonsa.video_chat import Answer, VideoChat

try:  # It is there on Spaces only, and must come before anything runs on a GPU.
    import spaces
except ImportError:
    spaces = None

SECONDS = 120  # for which an answer may have the GPU


def is_zero_gpu() -> bool:
    return spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true")


class LentChat:
    """A `VideoChat` whose answers are given in a process that ends, so that each question reads the video anew."""

    def __init__(self, chat: VideoChat):
        self.model, self.processor, self.memory = chat.model, chat.processor, chat.memory

        @spaces.GPU(duration=SECONDS)
        def answer(video: str, settings: dict, question: str, max_new_tokens: int):
            talk = chat.open(video, **settings)
            for piece in talk.stream(question, max_new_tokens=max_new_tokens):
                yield piece, None
            yield "", (str(talk.answer), vars(talk.answer), talk.choices, talk.choice_shares)

        self.lent = answer

    def open(self, video: str, **settings) -> "LentConversation":
        return LentConversation(self.lent, video, settings)


class LentConversation:
    """What the page needs of a `Conversation`; it has no memory."""

    ids, messages, cache = (), (), None

    def __init__(self, lent, video: str, settings: dict):
        self.lent, self.video, self.settings = lent, video, settings
        self.answer: Answer | None = None
        self.choices, self.choice_shares = [], []

    def stream(self, question: str, *, max_new_tokens: int, stop: threading.Event) -> Iterator[str]:
        self.answer, said = None, ""
        for piece, end in self.lent(self.video, self.settings, question, max_new_tokens):
            if end is not None:
                text, fields, self.choices, self.choice_shares = end
                self.answer = Answer(text, **fields)
            elif stop.is_set():
                self.answer = Answer(said, complete=False) if said else None
                return
            else:
                said += piece
                yield piece

    def undo(self) -> None:
        pass
