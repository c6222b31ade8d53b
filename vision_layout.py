"""Where the vision and text tokens of one forward call stand.

A *sample* is a row of the batch, or one of the sequences packed into a row. Vision tokens are listed sample by sample,
in the order of the stream. *Queries* are new tokens, counted among the batch * length of the call; *keys* are the
cached and the new tokens, `total` in each row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise

import torch
from torch.nn.functional import pad

from .nsa_released import Stream

MAX_MASK = 2**26  # elements of the boolean mask of one chunk of text queries
MAX_ROWS = 256  # text queries of such a chunk, so that few of their products are masked


@dataclass
class Keys:
    """Keys of one kind, vision or text."""

    rows: torch.Tensor  # int64 [M], batch row of each
    positions: torch.Tensor  # int64 [M], and its place among the keys of that row
    cu_seqlens: torch.Tensor  # int32 [samples + 1]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Those of x [batch, KV heads, total or more, dim] -> [M, KV heads, dim]."""
        return x[self.rows, :, self.positions]


@dataclass
class TextRun:
    """Adjacent text queries of one sample."""

    queries: torch.Tensor  # int64 [T]
    row: int
    start: int  # first key of the sample
    stop: int  # the key after that of the last query


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
    text_runs: list[TextRun]
    text_keys: Keys
    text_seen: torch.Tensor  # int32 [N], how many text keys of its sample come before a vision query
    valid: torch.Tensor | None  # bool [batch, total], False for padding
    length: int  # new tokens per row
    total: int  # cached and new tokens per row
    observe: Callable | None = None  # called by each layer: see `VideoNSAModel.forward`
    streams: list[SampleStream] = field(default_factory=list)  # only for the variant "released"

    @classmethod
    def make(
        cls,
        vision: torch.Tensor,
        length: int,
        valid: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        observe: Callable | None = None,
        make_stream: Callable | None = None,
    ) -> "VisionLayout":
        """The layout of a call.

        Args:
            vision: bool [batch, total]; the last `length` tokens of each row are new.
            valid: bool [batch, total], False for padding.
            starts: bool [batch, total], True where a packed sample begins.
            observe: see `VideoNSAModel.forward`.
            make_stream: makes a `Stream` of its first two arguments, if the variant needs one.
        """
        batch, total = vision.shape
        valid_or_all = torch.ones_like(vision) if valid is None else valid
        is_vision = (vision & valid_or_all).flatten()
        is_text = (~vision & valid_or_all).flatten()
        new = torch.arange(batch * total, device=vision.device).view(batch, total)[:, total - length :].flatten()

        # Samples, and the number of each token's sample.
        starts = torch.zeros_like(vision) if starts is None else starts.clone()
        starts[:, 0] = True
        sample = starts.flatten().cumsum(0) - 1  # [batch * total]
        edges = [*starts.flatten().nonzero().squeeze(1).tolist(), batch * total]
        samples = [(start // total, start % total, (stop - 1) % total + 1) for start, stop in pairwise(edges)]

        def cu_seqlens(tokens):
            counts = sample[tokens].bincount(minlength=len(samples))
            return pad(counts.cumsum(0), (1, 0)).int()

        def keys(chosen):
            tokens = chosen.nonzero().squeeze(1)
            return Keys(tokens // total, tokens % total, cu_seqlens(tokens))

        queries = is_vision[new].nonzero().squeeze(1)
        text_keys = keys(is_text)
        text_before = is_text.cumsum(0).int()[new[queries]]  # of all samples
        text_seen = text_before - text_keys.cu_seqlens[sample[new[queries]]]

        text = is_text[new].nonzero().squeeze(1)
        streams = []
        if make_stream:
            streams = sample_streams(is_vision.view(batch, total), valid_or_all, samples, length, make_stream)

        return cls(
            queries=queries,
            cu_seqlens=cu_seqlens(new[queries]),
            keys=keys(is_vision),
            text_runs=text_runs(text, new[text], sample[new[text]], samples, total),
            text_keys=text_keys,
            text_seen=text_seen,
            valid=valid,
            length=length,
            total=total,
            observe=observe,
            streams=streams,
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "VisionLayout":
        """This layout on another device; accelerate calls it where layers are spread over several."""
        if self.queries.device == torch.device(device):
            return self
        return _moved(self, device=device, non_blocking=non_blocking)

    def text_chunks(self, heads_per_group: int) -> Iterator[TextChunk]:
        """Yield the text queries as `TextChunk`s.

        Runs without padding stay whole where a fused kernel needs no mask: from the first token on, and on a GPU.
        Masks, repeated per head of a group, fit into `MAX_MASK`.
        """
        for run in self.text_runs:
            if self.valid is None and (run.queries.is_cuda or len(run.queries) == run.stop - run.start):
                yield TextChunk(run.queries, run.row, slice(run.start, run.stop), None)
                continue

            rows = max(1, min(MAX_ROWS, MAX_MASK // (heads_per_group * (run.stop - run.start))))
            stop = run.stop - len(run.queries)
            for part in run.queries.split(rows):
                stop += len(part)
                keys = slice(run.start, stop)
                position = torch.arange(stop - len(part), stop, device=part.device)  # [T], in the row
                mask = torch.arange(run.start, stop, device=part.device) <= position[:, None]
                if self.valid is not None:
                    mask = mask & self.valid[run.row, keys]
                yield TextChunk(part, run.row, keys, mask)


def text_runs(
    queries: torch.Tensor, places: torch.Tensor, owners: torch.Tensor, samples: list[tuple[int, int, int]], total: int
) -> list[TextRun]:
    """Text queries as runs of adjacent ones.

    Args:
        queries: int64 [T], the text queries of a call.
        places: int64 [T], their indices among the batch * total keys.
        owners: int64 [T], the sample of each.
        samples: row, first key and the key after the last, of each sample.
        total: keys per row.
    """
    begins = torch.ones_like(queries, dtype=torch.bool)
    begins[1:] = (places.diff() != 1) | (owners.diff() != 0)
    edges = [*begins.nonzero().squeeze(1).tolist(), len(queries)]
    last_places = places[begins.roll(-1)].tolist()
    runs = []
    for (first, end), owner, last in zip(pairwise(edges), owners[begins].tolist(), last_places, strict=True):
        row, start, _ = samples[owner]
        runs.append(TextRun(queries[first:end], row, start, last % total + 1))
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
        positions = torch.arange(start, stop, device=is_vision.device)
        positions = positions[valid[row, start:stop]]
        new_positions = positions[positions >= total - length]
        if is_vision[row, new_positions].any():
            stream = make_stream(is_vision[row, positions], len(new_positions))
            queries = new_positions + row * length - (total - length)
            streams.append(SampleStream(stream, queries, row, positions))
    return streams


def _moved(x, **options):
    """A tensor, list or record of these, with every tensor moved by `Tensor.to(**options)`."""
    if isinstance(x, torch.Tensor):
        return x.to(**options)
    if isinstance(x, list):
        return [_moved(part, **options) for part in x]
    if is_dataclass(x):
        return replace(x, **{f.name: _moved(getattr(x, f.name), **options) for f in fields(x)})
    return x
