"""How far the reading of a prompt is, and how long the rest takes: on a terminal, and in no redirected output."""

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .times import duration

LABEL = "reading   "
# Seconds that a prompt is read before it is worth a line, and between two lines.
PATIENCE, INTERVAL = 1.0, 0.2
# From how far apart lengths must be measured, as a quotient, to tell the two parts of their cost from each other.
SPREAD = 1.5


class Forecast:
    """Seconds that prompts take: a·n + b·n² of their n tokens, fitted to those measured by least squares of relative
    errors with a, b ≥ 0.

    Projections and MLPs cost the same for every token; attention of text tokens and to pooled blocks costs more, the
    more tokens there are. Lengths that are all about the same do not tell a from b: then both extremes are given.
    """

    def __init__(self):
        self.measured: list[tuple[float, float]] = []  # tokens, seconds

    def add(self, tokens: float, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            self.measured.append((tokens, seconds))

    def between(self, *tokens: int) -> tuple[float, float] | None:
        """The fewest and most seconds to expect of prompts of these lengths in all; None if nothing was measured."""
        if not self.measured:
            return None
        lengths = [n for n, _ in self.measured]
        parts = [self._fit()] if max(lengths) >= SPREAD * min(lengths) else self._extremes()
        linear, quadratic = sum(tokens), sum(n**2 for n in tokens)
        seconds = [a * linear + b * quadratic for a, b in parts]
        return min(seconds), max(seconds)

    def _extremes(self) -> list[tuple[float, float]]:
        """(a, 0) and (0, b)."""
        return [
            (statistics.median(seconds / n for n, seconds in self.measured), 0.0),
            (0.0, statistics.median(seconds / n**2 for n, seconds in self.measured)),
        ]

    def _fit(self) -> tuple[float, float]:
        rows = np.array([(n / seconds, n**2 / seconds) for n, seconds in self.measured])
        a, b = np.linalg.lstsq(rows, np.ones(len(rows)))[0]
        if min(a, b) >= 0:
            return float(a), float(b)
        # One part alone fits best.
        kept = 0 if b < 0 else 1
        alone = float(rows[:, kept].sum() / (rows[:, kept] ** 2).sum())
        return (alone, 0.0) if kept == 0 else (0.0, alone)


@contextmanager
def prefill_progress(model, show: Callable[[str], None] | None = None) -> Iterator[None]:
    """Show how far a model is with each prompt that it reads meanwhile: the layer, the tokens, the time left.

    Args:
        model: a `VideoNSAForConditionalGeneration`.
        show: is given what to show, and "" when a prompt is read. Default: a line of its own on stderr, which goes when
            the prompt is read; nothing where stderr is no terminal.
    """
    if show is None and not sys.stderr.isatty():
        yield
        return
    watch = Watch(model.model, show or show_line)
    try:
        yield
    finally:
        watch.remove()


class Watch:
    """Hooks on the layers of the vision tower and of the language model.

    All layers of the language model compute the same on as many tokens, so that the rest of them takes the median of
    those that are done, each. Blocks of the vision tower are of two kinds, and its rest is known when both were timed.
    """

    def __init__(self, model, show: Callable[[str], None]):
        self.show, self.shown, self.began, self.visible = show, 0.0, 0.0, False
        tower, layers = model.visual, model.language_model.layers
        full = set(getattr(tower.config, "fullatt_block_indexes", ()))
        self.parts = {
            "vision tower, block": [i in full for i in range(len(tower.blocks))],
            "layer": [False] * len(layers),
        }
        self.times: dict[str, list[tuple[bool, float]]] = {part: [] for part in self.parts}
        blocks = [("vision tower, block", i, block) for i, block in enumerate(tower.blocks)]
        blocks += [("layer", i, layer) for i, layer in enumerate(layers)]
        self.handles = [model.language_model.norm.register_forward_pre_hook(self._end)]
        for part, i, block in blocks:
            enter, leave = (self._hook(function, part, i) for function in (self._enter, self._leave))
            self.handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            # A hook after the last layer would have it compute tokens that nobody reads.
            if block is not layers[-1]:
                self.handles.append(block.register_forward_hook(leave, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self._clear()

    def _hook(self, function, part: str, i: int):
        def hook(module, args, kwargs, *output):
            x = args[0] if args else kwargs["hidden_states"]
            # A step of the answer, or the last layer, if it computes the last token only.
            if part == "layer" and x.shape[1] == 1:
                return
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            function(part, i, x)

        return hook

    def _enter(self, part: str, i: int, x) -> None:
        self.entered = time.perf_counter()
        if i == 0:
            self.times[part] = []
            if part != "layer" or not self.times["vision tower, block"]:
                self.began = self.entered
        tokens = f", {x.shape[1]:,} tokens" if part == "layer" else ""
        self._tell(part, i, tokens)

    def _leave(self, part: str, i: int, x) -> None:
        self.times[part].append((self.parts[part][i], time.perf_counter() - self.entered))

    def _end(self, *_) -> None:
        self.times = {part: [] for part in self.parts}
        self._clear()

    def _tell(self, part: str, i: int, tokens: str) -> None:
        now = time.perf_counter()
        if now - self.began < PATIENCE or now - self.shown < INTERVAL:
            return
        self.shown, self.visible = now, True
        left = self._left(part)
        left = "" if left is None else f", about {duration(left)} left"
        if part != "layer" and left:
            left += f", then {len(self.parts['layer'])} layers"
        self.show(f"{part} {i + 1} of {len(self.parts[part])}{tokens}, {duration(now - self.began)} so far{left}")

    def _left(self, part: str) -> float | None:
        """Seconds that the rest of a part takes, if each kind of its blocks was timed."""
        times, total = self.times[part], 0.0
        for kind in self.parts[part][len(times) :]:
            same = [seconds for other, seconds in times if other == kind]
            if not same:
                return None
            total += statistics.median(same)
        return total

    def _clear(self) -> None:
        if self.visible:
            self.show("")
        self.visible = False


def show_line(text: str) -> None:
    """Show a text in the current line of stderr, in place of what was there; nothing if stderr is no terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        line = (LABEL + text)[:width] if text else ""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
