"""Where the vision and text tokens of one forward call stand.

A *sample* is a row of the batch, or one of the sequences packed into a row. Vision tokens are listed sample by sample,
in the order of the stream. *Queries* are new tokens, counted among the batch * length of the call; *keys* are the
cached and the new tokens, `total` in each row.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise

import torch
from torch.nn.functional import pad

from .configuration_videonsa import SparseTextConfig
from .nsa_released import Stream

MAX_MASK = 2**26  # elements of the boolean mask of one chunk of text queries
MAX_ROWS = 256  # text queries of such a chunk, so that few of their products are masked
# A call for a few text queries costs as much as so many more of them: it reads all keys. Measured on a CPU, for the
# shape of the 7B with 2K and 8K keys.
CALL_ROWS = 4


@dataclass
class Keys:
    """Keys of one kind, vision or text."""

    rows: torch.Tensor  # int64 [M], batch row of each
    positions: torch.Tensor  # int64 [M], and its place among the keys of that row
    cu_seqlens: torch.Tensor  # int32 [samples + 1]

    @classmethod
    def of(cls, chosen: torch.Tensor, total: int, sample: torch.Tensor, count: int) -> "Keys":
        """Where chosen, bool [batch * total], is True; see `cu_seqlens`."""
        tokens = chosen.nonzero().squeeze(1)
        return cls(tokens // total, tokens % total, cu_seqlens(sample[tokens], count))

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Those of x [batch, KV heads, total or more, dim] -> [M, KV heads, dim]."""
        return x[self.rows, :, self.positions]


@dataclass
class TextRun:
    """Text queries of one sample that are computed together: adjacent ones, or such runs with vision between."""

    first: int  # in the list of text queries
    end: int
    row: int
    start: int  # first key of the sample
    stop: int  # the key after that of the last query
    adjacent: bool = True

    def joins(self, other: "TextRun") -> bool:
        """Whether one call for this run and the next one costs no more than two, by the pairs of queries and keys."""
        if (self.row, self.start) != (other.row, other.start) or other.end - self.first > MAX_ROWS:
            return False
        masked = (self.end - self.first) * (other.stop - self.stop)
        return masked <= CALL_ROWS * (self.stop - self.start)


@dataclass
class TextChunk:
    """Some of a run of text queries, and the keys up to the last of them."""

    queries: torch.Tensor  # int64 [T]
    row: int
    keys: slice  # of the row
    # bool [T, keys], made anew by each use: see VisionLayout.text_chunks. None for the last T of the keys, all causal.
    mask: torch.Tensor | None


@dataclass
class SampleStream:
    """A sample with a vision query, as `released_attention` takes it."""

    stream: Stream
    queries: torch.Tensor  # int64 [n], text and vision
    row: int
    positions: torch.Tensor  # int64 [L], of its keys in the row


@dataclass
class VisionLayout:
    """Made once per forward call, read by every layer."""

    queries: torch.Tensor  # int64 [N], of vision
    cu_seqlens: torch.Tensor  # int32 [samples + 1], of `queries`
    keys: Keys  # of vision
    text: torch.Tensor  # int64 [T], text queries
    text_runs: list[TextRun]
    text_keys: Keys
    text_seen: torch.Tensor  # int32 [N], how many text keys of its sample come before a vision query
    valid: torch.Tensor | None  # bool [batch, total], False for padding
    length: int  # new tokens per row
    total: int  # cached and new tokens per row
    observe: Callable | None = None  # called by each layer: see `SparseModel.forward`
    streams: list[SampleStream] = field(default_factory=list)  # only for the variant "released"
    last: "VisionLayout | None" = None  # for the last layer, if its output is read at the last tokens alone

    @classmethod
    def make(
        cls,
        vision: torch.Tensor,
        length: int,
        valid: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        observe: Callable | None = None,
        make_stream: Callable | None = None,
        last: int = 0,
    ) -> "VisionLayout":
        """The layout of a call, on the device of its arguments. Give it masks on the CPU: every step reads results of
        the one before, so that a GPU would be waited for ten times and more.

        Args:
            vision: bool [batch, total]; the last `length` tokens of each row are new.
            valid: bool [batch, total], False for padding.
            starts: bool [batch, total], True where a packed sample begins.
            observe: see `SparseModel.forward`.
            make_stream: makes a `Stream` of its first two arguments, if the variant needs one.
            last: new tokens per row, counted from the end, at which the last layer's output is read; 0 for all.
        """
        batch, total = vision.shape
        valid_or_all = torch.ones_like(vision) if valid is None else valid
        is_vision = (vision & valid_or_all).flatten()
        is_text = (~vision & valid_or_all).flatten()
        sample, samples = samples_of(torch.zeros_like(vision) if starts is None else starts)
        keys, text_keys = (Keys.of(kind, total, sample, len(samples)) for kind in (is_vision, is_text))
        text_before = is_text.cumsum(0).int()  # in all samples, this token included

        def queries_of(length):
            new = torch.ones_like(vision)
            new[:, : total - length] = False
            new = new.flatten().nonzero().squeeze(1)
            queries, text = (kind[new].nonzero().squeeze(1) for kind in (is_vision, is_text))
            return {
                "queries": queries,
                "cu_seqlens": cu_seqlens(sample[new[queries]], len(samples)),
                "text": text,
                "text_runs": text_runs(new[text], sample[new[text]], samples, total),
                "text_seen": text_before[new[queries]] - text_keys.cu_seqlens[sample[new[queries]]],
                "length": length,
            }

        streams = []
        if make_stream:
            streams = sample_streams(is_vision.view(batch, total), valid_or_all, samples, length, make_stream)

        layout = cls(
            **queries_of(length),
            keys=keys,
            text_keys=text_keys,
            valid=valid,
            total=total,
            observe=observe,
            streams=streams,
        )
        if 0 < last < length:
            layout.last = replace(layout, **queries_of(last))
        return layout

    def to(self, device: torch.device, non_blocking: bool = False) -> "VisionLayout":
        """This layout on another device; accelerate calls it where layers are spread over several."""
        if self.queries.device == torch.device(device):
            return self
        return _moved(self, torch.device(device), non_blocking)

    def text_chunks(self, heads_per_group: int) -> Iterator[TextChunk]:
        """Yield the text queries as `TextChunk`s.

        Adjacent ones without padding stay whole where a fused kernel needs no mask: from the first token on, and on a
        GPU. Masks, repeated per head of a group, fit into `MAX_MASK`.
        """
        for run in self.text_runs:
            queries = self.text[run.first : run.end]
            whole = run.adjacent and (queries.is_cuda or len(queries) == run.stop - run.start)
            if whole and self.valid is None:
                yield TextChunk(queries, run.row, slice(run.start, run.stop), None)
                continue

            rows = max(1, min(MAX_ROWS, MAX_MASK // (heads_per_group * (run.stop - run.start))))
            stop = run.stop - len(queries)
            for part in queries.split(rows):
                stop += len(part)  # the last of these queries is before it
                keys = slice(run.start, stop)
                position = part + (self.total - self.length - run.row * self.length)  # [T], in the row
                mask = torch.arange(run.start, stop, device=part.device) <= position[:, None]
                if self.valid is not None:
                    mask = mask & self.valid[run.row, keys]
                yield TextChunk(part, run.row, keys, mask)


def layout_of_call(
    config: SparseTextConfig,
    vision: torch.Tensor,
    past: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    observe: Callable | None,
    last: int,
) -> VisionLayout:
    """The layout of a call of the text model, on the device of `vision`.

    Args:
        vision: bool [batch, total], which cached and new tokens are vision.
        past: cached tokens per row.
        attention_mask, position_ids: of the call, as transformers gives them.
        observe, last: see `VisionLayout.make`.

    Raises:
        ValueError: attention_mask is not [batch, total].
    """
    batch, total = vision.shape
    masks = {"vision": vision}
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch, total):
            got = list(getattr(attention_mask, "shape", [])) or type(attention_mask).__name__
            raise ValueError(f"attention_mask must be [batch, cached + new tokens] = {[batch, total]}, got {got}")
        masks["valid"] = attention_mask.to(vision.device, torch.bool)
    elif past == 0 and position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
        # Samples packed into a row: its text positions (the first of four) start anew with each.
        text_positions = position_ids[0].expand(batch, -1)
        begins = text_positions.diff(dim=1, prepend=text_positions[:, :1] - 1) != 1
        masks["starts"] = begins.to(vision.device)

    # All that a layout needs of the device, in one copy.
    masks = dict(zip(masks, torch.stack(list(masks.values())).cpu(), strict=True))
    if "valid" in masks and masks["valid"].all():
        del masks["valid"]

    make_stream = None
    if config.nsa_variant == "released":
        make_stream = functools.partial(Stream.make, block_size=config.block_size, block_count=config.block_count)
    options = {"observe": observe, "make_stream": make_stream, "last": last}
    return VisionLayout.make(length=total - past, **masks, **options).to(vision.device)


def vision_by_position(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """bool [batch, length]: tokens whose time, row and column differ, as the public code tells vision from text.

    The first patch of an image or video, and others on that diagonal, count as text; without positions, or with those
    of text alone, all tokens do, and the result is None.
    """
    if position_ids is None or position_ids.ndim < 3:
        return None
    time, row, column = position_ids[-3:]
    mask = (time != row) | (time != column)
    return mask if mask.any() else None


def samples_of(starts: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """The sample of each token, int64 [batch * total], and of each sample its row, first key and the key after its
    last, from starts bool [batch, total], True where a sample begins within a row."""
    total = starts.shape[1]
    starts = starts.clone()
    starts[:, 0] = True
    edges = [*starts.flatten().nonzero().squeeze(1).tolist(), starts.numel()]
    samples = [(start // total, start % total, (stop - 1) % total + 1) for start, stop in pairwise(edges)]
    return starts.flatten().cumsum(0) - 1, samples


def cu_seqlens(owners: torch.Tensor, count: int) -> torch.Tensor:
    """Where each of so many samples starts and ends, int32 [count + 1], from the sample of each token, ascending."""
    return pad(owners.bincount(minlength=count).cumsum(0), (1, 0)).int()


def text_runs(
    places: torch.Tensor, owners: torch.Tensor, samples: list[tuple[int, int, int]], total: int
) -> list[TextRun]:
    """Text queries as runs, joined where that costs no more: a chat of hundreds of images has as many.

    Args:
        places: int64 [T], indices of the text queries among the batch * total keys.
        owners: int64 [T], the sample of each.
        samples: row, first key and the key after the last, of each sample.
        total: keys per row.
    """
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = (places.diff() != 1) | (owners.diff() != 0)
    edges = [*begins.nonzero().squeeze(1).tolist(), len(places)]
    last_places = places[begins.roll(-1)].tolist()
    runs = []
    for (first, end), owner, last in zip(pairwise(edges), owners[begins].tolist(), last_places, strict=True):
        row, start, _ = samples[owner]
        run = TextRun(first, end, row, start, last % total + 1)
        if runs and runs[-1].joins(run):
            run = replace(run, first=runs.pop().first, adjacent=False)
        runs.append(run)
    return runs


def sample_streams(
    is_vision: torch.Tensor,
    valid: torch.Tensor,
    samples: list[tuple[int, int, int]],
    length: int,
    make_stream: Callable,
) -> list[SampleStream]:
    """The samples with a vision query, as `released_attention` takes them.

    Args:
        is_vision, valid: bool [batch, total].
        samples: row, first key and the key after the last, of each sample.
        length: new tokens per row.
        make_stream: see `VisionLayout.make`.
    """
    total = is_vision.shape[1]
    streams = []
    for row, start, stop in samples:
        positions = start + valid[row, start:stop].nonzero().squeeze(1)
        new_positions = positions[positions >= total - length]
        if is_vision[row, new_positions].any():
            stream = make_stream(is_vision[row, positions], len(new_positions))
            queries = new_positions + row * length - (total - length)
            streams.append(SampleStream(stream, queries, row, positions))
    return streams


def send(x: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
    """x on another device. From the CPU to a GPU by pinned memory, so that nothing waits for what the GPU has to do."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device, non_blocking=non_blocking)


def _moved(x, *where):
    """A tensor, list or record of these, with every tensor moved by `send`."""
    if isinstance(x, torch.Tensor):
        return send(x, *where)
    if isinstance(x, list):
        return [_moved(part, *where) for part in x]
    if is_dataclass(x):
        return replace(x, **{f.name: _moved(getattr(x, f.name), *where) for f in fields(x)})
    return x
