"""Who waits for a model that answers one question at a time."""

import threading
import time
from dataclasses import dataclass, field


@dataclass(eq=False)
class Place:
    """A question in the line. `seconds` is what its answer is expected to take, None if nobody can tell."""

    seconds: float | None
    joined: float = field(default_factory=time.monotonic)
    started: float | None = None
    turn: threading.Event = field(default_factory=threading.Event)


class Line:
    """First come, first served; safe to share between threads.

    Args:
        most: questions that may wait behind the one that is answered.
    """

    def __init__(self, most: int):
        self.most = most
        self.places: list[Place] = []
        self.lock = threading.Lock()

    def join(self, seconds: float | None) -> Place:
        with self.lock:
            if len(self.places) > self.most:
                raise ValueError(f"{self.most} questions wait already, the limit. Ask again in a minute.")
            place = Place(seconds)
            self.places.append(place)
            self._call()
        return place

    def leave(self, place: Place) -> None:
        with self.lock:
            if place in self.places:
                self.places.remove(place)
            self._call()

    def describe(self, place: Place) -> str:
        """How many are before a place, and how long that may last."""
        with self.lock:
            before = self.places[: self.places.index(place)] if place in self.places else []
        now, count = time.monotonic(), len(before)
        who = "Waiting for 1 other question" if count == 1 else f"Waiting for {count} other questions"
        waited = f"{now - place.joined:.0f} s so far"
        if not count or any(other.seconds is None for other in before):
            return f"{who}, {waited}."
        left = sum(max(other.seconds - (now - (other.started or now)), 0) for other in before)
        return f"{who}: about {max(left, 1):.0f} s more, {waited}."

    def _call(self) -> None:
        if self.places and not self.places[0].turn.is_set():
            self.places[0].started = time.monotonic()
            self.places[0].turn.set()
