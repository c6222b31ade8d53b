"""Sequence parallelism: the tokens of a call spread over the ranks of a mesh, with the results of one process.

Every rank gets the whole input. Inside the text model it keeps 1/P of the tokens, and all of their layers' work but
attention. An all-to-all around attention gives it all tokens of 1/P of the heads, since a KV head needs no other:

    tokens of a rank, all heads  --Scatter-->  all tokens, heads of a rank  --Gather-->  tokens of a rank, all heads

With more ranks than KV heads, those that share a KV head split its queries, each with all keys before them. Every rank
knows the layout of the whole call. The mean over ranks of the gradients is the gradient of one process, which is what
data parallelism computes anyway. `docs/parallel.md` draws the way of the data.
"""

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain, pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .transformers_compat import CACHE
from .vision_layout import Keys, TextChunk, VisionLayout

IGNORED = -100  # a label without loss

SHARDED_ATTENTION = "videonsa_sharded"


def check_mesh(mesh: DeviceMesh, config) -> None:
    """Raise a ValueError if a text model of this configuration cannot spread its tokens over `mesh`."""
    if mesh.ndim != 1:
        raise ValueError(f'mesh must have one dimension, such as mesh["sequence"], got {mesh.mesh_dim_names or mesh}')
    ranks, groups = mesh.size(), config.num_key_value_heads
    if ranks % groups and groups % ranks:
        raise ValueError(
            f"the mesh has {ranks} ranks, and the model {groups} KV heads: one must be a multiple of the other"
        )
    if config.nsa_variant == "released":
        raise ValueError(
            'nsa_variant="released" has no sequence parallelism: its heads read each other\'s blocks. '
            'Load the model with nsa_variant="paper"'
        )


@dataclass
class SequenceShards:
    """Who has which tokens and heads in one call. Made once per call, read by every layer."""

    mesh: DeviceMesh
    sharing: int  # ranks that share a KV head; 1 if each has some of its own
    length: int  # new tokens per row
    sparse: bool  # whether a rank has vision queries
    layout: VisionLayout  # of the queries that this rank attends with

    @classmethod
    def make(cls, mesh: DeviceMesh, config, layout: VisionLayout) -> "SequenceShards":
        """The shards of a call that has this layout in one process."""
        check_mesh(mesh, config)
        sharing = max(1, mesh.size() // config.num_key_value_heads)
        shards = cls(mesh, sharing, layout.length, layout.queries.numel() > 0, layout)
        return replace(shards, layout=restricted(layout, shards.queries(shards.rank)))

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    def tokens(self, rank: int) -> slice:
        """The tokens of each row that a rank keeps; the last ranks may have fewer than others, or none."""
        return own_tokens(self.length, self.size, rank)

    def heads(self, count: int, rank: int) -> slice:
        """The heads that a rank attends with, of all `count`, or of `count` KV heads."""
        own = count // (self.size // self.sharing)
        return slice(rank // self.sharing * own, (rank // self.sharing + 1) * own)

    def queries(self, rank: int) -> list[slice]:
        """The tokens of each row that a rank attends with as queries.

        Ranks that share a KV head get one part of the front half of a row and one of the back half each, the first
        with the last: later queries have more keys.
        """
        parts = 2 * self.sharing
        edges = [self.length * i // parts for i in range(parts + 1)]
        first = rank % self.sharing
        last = parts - 1 - first
        if first + 1 == last:
            return [slice(edges[first], edges[last + 1])]
        return [slice(edges[i], edges[i + 1]) for i in (first, last)]

    def pieces(self, keeper: int, worker: int, keys: bool) -> list[slice]:
        """The tokens that `keeper` keeps and `worker` attends with: as keys, or as queries."""
        kept = self.tokens(keeper)
        wanted = [slice(0, self.length)] if keys else self.queries(worker)
        both = [slice(max(kept.start, x.start), min(kept.stop, x.stop)) for x in wanted]
        return [x for x in both if x.start < x.stop]


def own_tokens(length: int, ranks: int, rank: int) -> slice:
    """Which of `length` tokens one of `ranks` ranks keeps."""
    count = shard_length(length, ranks)
    start = min(rank * count, length)
    return slice(start, min(start + count, length))


def shard_length(length: int, ranks: int) -> int:
    """Tokens of a shard, padding included."""
    return -(-length // ranks)


# ----------------------------------------------------------------------------------------------------------------------
# Around the stock forward of the text model and of the model with a head
# ----------------------------------------------------------------------------------------------------------------------


def shard_tokens(model, past: int, kwargs: dict) -> None:
    """Cut the arguments of the text model's forward, in place, to the tokens of this rank.

    Args:
        model: a text model with a `sequence_mesh`.
        past: cached tokens.
        kwargs: have `vision_layout`, of the whole call, which becomes a `SequenceShards`.
    """
    cache = kwargs.get(CACHE)
    if getattr(cache, "is_compileable", False):
        raise ValueError("a static cache has no sequence parallelism: leave cache_implementation out")
    shards = SequenceShards.make(model.sequence_mesh, model.config, kwargs["vision_layout"])
    embeds, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
    if embeds is None:
        embeds = model.embed_tokens(kwargs.pop("input_ids"))
    if positions is None:
        positions = torch.arange(past, past + shards.length, device=embeds.device).expand(3, 1, -1)
    own = shards.tokens(shards.rank)
    missing = shard_length(shards.length, shards.size) - (own.stop - own.start)
    kwargs["inputs_embeds"] = pad(embeds[:, own], (0, 0, 0, missing))
    kwargs["position_ids"] = pad(positions[..., own], (0, missing))
    kwargs["vision_layout"] = shards


def forward_with_head(forward: Callable, mesh: DeviceMesh, kwargs: dict):
    """Call the stock forward of a model with a head, whose hidden states are those of this rank's tokens.

    Each rank applies the head to its own tokens. Without labels, every rank gets the logits that one process has. With
    labels, every rank gets the loss of one process, and the logits of its own tokens.
    """
    ids = kwargs.get("input_ids")
    length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    device = kwargs["inputs_embeds"].device if ids is None else ids.device
    labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    return_dict = kwargs.pop("return_dict", None)

    keep = kwargs.pop("logits_to_keep", 0)
    kept = torch.arange(length, device=device)[slice(-keep, None) if isinstance(keep, int) else keep]
    own = own_tokens(length, mesh.size(), mesh.get_local_rank())
    inside = ((kept >= own.start) & (kept < own.stop)).nonzero().squeeze(1)
    kwargs["logits_to_keep"] = kept[inside] - own.start
    if labels is not None:
        if targets is None:
            targets = pad(labels[:, 1:], (0, 1), value=IGNORED)[:, kept.to(labels.device)]
        if kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = (targets != IGNORED).sum()
        kwargs["labels"] = kwargs["shift_labels"] = targets[:, inside.to(targets.device)]

    outputs = forward(**kwargs, return_dict=True)
    if labels is not None:
        outputs["loss"] = Sum.apply(outputs.loss, mesh)
    else:
        logits = outputs.logits
        every = logits.new_zeros(len(logits), len(kept), logits.shape[2])
        outputs["logits"] = Sum.apply(every.index_copy(1, inside.to(logits.device), logits), mesh)
    return outputs.to_tuple() if return_dict is False else outputs


def shard_frames(tower: nn.Module, mesh: DeviceMesh | None) -> None:
    """Have a vision tower spread the frames of each call over the ranks of `mesh`; None ends it."""
    forward = tower.forward
    # Of an earlier mesh.
    if getattr(forward, "func", None) is forward_tower:
        (forward, _) = forward.args
    tower.forward = forward if mesh is None else functools.partial(forward_tower, forward, mesh)


def forward_tower(tower: Callable, mesh: DeviceMesh, pixels: torch.Tensor, grid_thw: torch.Tensor, **kwargs):
    """Call the stock forward of the vision tower for the frames of this rank, and gather the features of all.

    No frame sees another one, so that they may be apart. `last_hidden_state`, which the model does not use, stays that
    of this rank's frames. Fewer frames than ranks are not spread.
    """
    grids, ranks = grid_thw.tolist(), mesh.size()
    frames = [height * width for count, height, width in grids for _ in range(count)]  # patches of each
    if len(frames) < ranks:
        return tower(pixels, grid_thw=grid_thw, **kwargs)
    edges = [len(frames) * i // ranks for i in range(ranks + 1)]
    patches = [sum(frames[first:stop]) for first, stop in pairwise(edges)]
    first, stop = edges[mesh.get_local_rank() :][:2]

    own, start = [], 0
    for count, height, width in grids:
        inside = min(start + count, stop) - max(start, first)
        if inside > 0:
            own.append([inside, height, width])
        start += count

    pixels = pixels.split(patches)[mesh.get_local_rank()]
    outputs = tower(pixels, grid_thw=grid_thw.new_tensor(own), **kwargs)
    features = outputs.pooler_output
    merge = len(pixels) // len(features)  # patches of a feature
    outputs.pooler_output = GatherRows.apply(features, [count // merge for count in patches], mesh)
    return outputs


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ShardedCall:
    """What `_attend_sharded` needs of one call of one layer, beyond what every attention function gets."""

    attention: nn.Module  # a `SparseAttention`
    gates: torch.Tensor | None  # [batch, heads, tokens of this rank, 3]
    shards: SequenceShards
    cache: object | None
    done: bool = False


def forward_sharded(attention, hidden_states: torch.Tensor, shards: SequenceShards, **kwargs):
    """The forward of a `SparseAttention` for the tokens of this rank, hidden_states [batch, tokens, hidden].

    The cache holds all tokens of this rank's heads.
    """
    gates = None
    sparse = shards.sparse and attention.config.nsa_variant == "paper"
    # In training also for text alone: data parallelism needs every parameter in the graph.
    if sparse or (attention.has_gates and attention.training and torch.is_grad_enabled()):
        gates = attention.gates(hidden_states).transpose(1, 2)
    call = ShardedCall(attention, gates, shards, kwargs.pop(CACHE, None))
    outputs = attention.stock_forward(SHARDED_ATTENTION, hidden_states, call=call, **{CACHE: None}, **kwargs)
    attention.check_called(call.done)
    return outputs


def _attend_sharded(module, q, k, v, attention_mask, *, call: ShardedCall, **kwargs) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: q [batch, heads, tokens of this rank, dim], k and v of all KV heads."""
    call.done = True
    attention, shards, layout = call.attention, call.shards, call.shards.layout
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the rotary factors are fp32
    q, k, v = Scatter.apply(q, shards, False), Scatter.apply(k, shards, True), Scatter.apply(v, shards, True)
    scattered = [q, k, v]
    gates = None
    if call.gates is not None:
        scattered.append(Scatter.apply(call.gates, shards, False))
        if len(layout.queries) > 0 and attention.config.nsa_variant == "paper":
            gates = scattered[-1].transpose(1, 2).flatten(0, 1)[layout.queries]  # [N, heads of this rank, 3]
    if call.cache is not None:
        k, v = call.cache.update(k, v, attention.layer_idx)

    output = attention.attend(q, k, v, gates, layout)  # [batch, length, heads of this rank, dim]
    output = Tie.apply(output, *scattered).transpose(1, 2)
    return Gather.apply(output, shards).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(SHARDED_ATTENTION, _attend_sharded)


@dataclass
class QueriesOfRank(VisionLayout):
    """A layout whose queries are those in some ranges of every row."""

    whole: VisionLayout | None = None
    ranges: list[slice] = field(default_factory=list)
    # For each chunk of text queries of the whole layout, where the ranges begin and end in it.
    edges: list[list[tuple[int, int]]] = field(default_factory=list)

    def text_chunks(self, heads_per_group: int) -> Iterator[TextChunk]:
        """Yield the chunks of the whole layout, cut to the ranges."""
        for number, chunk in enumerate(self.whole.text_chunks(heads_per_group)):
            if number == len(self.edges):  # in the first layer: it waits for the device
                places = (chunk.queries - chunk.row * self.length).tolist()
                self.edges.append([(bisect_left(places, x.start), bisect_left(places, x.stop)) for x in self.ranges])
            for begin, end in self.edges[number]:
                if begin == end:
                    continue
                keys, mask = chunk.keys, chunk.mask
                if mask is None:  # each query sees one key more than the one before it
                    keys = slice(keys.start, keys.stop - (len(chunk.queries) - end))
                else:
                    mask = mask[begin:end]
                yield TextChunk(chunk.queries[begin:end], chunk.row, keys, mask)


def restricted(layout: VisionLayout, ranges: list[slice]) -> VisionLayout:
    """A layout with the queries of these ranges of every row only.

    A sample of vision queries becomes one for each range, with the keys up to its last query: queries stay the last
    tokens of their stream.
    """
    if ranges == [slice(0, layout.length)]:
        return layout
    places = (layout.queries % layout.length).tolist()  # in their rows: they rise within a sample
    seen, vision, text = (x.tolist() for x in (layout.cu_seqlens, layout.keys.cu_seqlens, layout.text_keys.cu_seqlens))
    queries, keys, texts = [], [], []
    for i, (first, stop) in enumerate(pairwise(seen)):
        for part in ranges:
            begin, end = (bisect_left(places, edge, first, stop) for edge in (part.start, part.stop))
            if begin < end:
                queries.append(slice(begin, end))
                keys.append(slice(vision[i], vision[i + 1] - (stop - end)))
                texts.append(slice(text[i], text[i + 1]))

    def starts(slices: list[slice]) -> torch.Tensor:
        counts = accumulate((x.stop - x.start for x in slices), initial=0)
        return layout.cu_seqlens.new_tensor(list(counts))

    def take(x: torch.Tensor, slices: list[slice]) -> torch.Tensor:
        return torch.cat([x[:0], *(x[part] for part in slices)])

    def some(every: Keys, slices: list[slice]) -> Keys:
        return Keys(take(every.rows, slices), take(every.positions, slices), starts(slices))

    own = {
        "queries": take(layout.queries, queries),
        "cu_seqlens": starts(queries),
        "keys": some(layout.keys, keys),
        "text_keys": some(layout.text_keys, texts),
        "text_seen": take(layout.text_seen, queries),
    }
    shared = {x.name: getattr(layout, x.name) for x in fields(layout)}
    return QueriesOfRank(**{**shared, **own}, whole=layout, ranges=ranges)


# ----------------------------------------------------------------------------------------------------------------------
# Communication
# ----------------------------------------------------------------------------------------------------------------------


class Scatter(torch.autograd.Function):
    """x [batch, heads, tokens of this rank, dim] -> [batch, heads of this rank, length, dim].

    keys: whether every rank gets all tokens. Otherwise those that are not its queries are 0.
    """

    @staticmethod
    def forward(ctx, x, shards: SequenceShards, keys: bool):
        ctx.shards, ctx.keys, ctx.heads = shards, keys, x.shape[1]
        return _scatter(x, shards, keys)

    @staticmethod
    def backward(ctx, gradient):
        return _gather(gradient, ctx.shards, ctx.heads, ctx.keys), None, None


class Gather(torch.autograd.Function):
    """x [batch, heads of this rank, length, dim] of queries -> [batch, heads, tokens of this rank, dim]."""

    @staticmethod
    def forward(ctx, x, shards: SequenceShards):
        ctx.shards = shards
        return _gather(x, shards, x.shape[1] * (shards.size // shards.sharing), keys=False)

    @staticmethod
    def backward(ctx, gradient):
        return _scatter(gradient, ctx.shards, keys=False), None


class GatherRows(torch.autograd.Function):
    """The rows [any, dim] of all ranks, one rank after another; counts: how many each has."""

    @staticmethod
    def forward(ctx, x, counts: list[int], mesh: DeviceMesh):
        ctx.counts, ctx.mesh = counts, mesh
        rows = x.new_empty(sum(counts), x.shape[1])
        sent = x.repeat(mesh.size(), 1)
        dist.all_to_all_single(rows, sent, counts, [len(x)] * mesh.size(), group=mesh.get_group())
        return rows

    @staticmethod
    def backward(ctx, gradient):
        own, ranks = ctx.counts[ctx.mesh.get_local_rank()], ctx.mesh.size()
        received = gradient.new_empty(ranks, own, gradient.shape[1])
        rows = received.flatten(0, 1)
        dist.all_to_all_single(rows, gradient.contiguous(), [own] * ranks, ctx.counts, group=ctx.mesh.get_group())
        return received.sum(0), None, None


class Sum(torch.autograd.Function):
    """The sum over ranks of x; its gradient is the sum over ranks of theirs."""

    @staticmethod
    def forward(ctx, x, mesh: DeviceMesh):
        ctx.mesh = mesh
        x = x.clone()
        dist.all_reduce(x, group=mesh.get_group())
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.mesh.get_group())
        return gradient, None


class Tie(torch.autograd.Function):
    """x, with the other tensors in its graph: a rank without queries communicates in the backward pass, too."""

    @staticmethod
    def forward(ctx, x, *others):
        ctx.count = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *[None] * ctx.count


def _scatter(x: torch.Tensor, shards: SequenceShards, keys: bool) -> torch.Tensor:
    heads = shards.heads(x.shape[1], shards.rank)
    # In this order in memory, which attention wants.
    y = x.new_zeros(len(x), shards.length, heads.stop - heads.start, x.shape[3]).transpose(1, 2)
    mine, theirs = _blocks(x, y, shards, keys)
    _exchange(x, mine, theirs, shards)
    return y


def _gather(y: torch.Tensor, shards: SequenceShards, heads: int, keys: bool) -> torch.Tensor:
    tokens = shard_length(shards.length, shards.size)
    x = y.new_zeros(len(y), tokens, heads, y.shape[3]).transpose(1, 2)
    mine, theirs = _blocks(x, y, shards, keys)
    _exchange(y, theirs, mine, shards)
    return x


Blocks = list[list[torch.Tensor]]  # for each rank, parts [batch, heads, tokens, dim] of a tensor


def _blocks(x: torch.Tensor, y: torch.Tensor, shards: SequenceShards, keys: bool) -> tuple[Blocks, Blocks]:
    """The parts of x, which has this rank's tokens, that each rank attends with, and the parts of y, which has this
    rank's heads, that each rank keeps."""
    rank, ranks = shards.rank, range(shards.size)
    start = shards.tokens(rank).start
    mine = [
        [
            x[:, shards.heads(x.shape[1], other), part.start - start : part.stop - start]
            for part in shards.pieces(rank, other, keys)
        ]
        for other in ranks
    ]
    theirs = [[y[:, :, part] for part in shards.pieces(other, rank, keys)] for other in ranks]
    return mine, theirs


def _exchange(like: torch.Tensor, outgoing: Blocks, incoming: Blocks, shards: SequenceShards) -> None:
    """Send outgoing[i] to rank i, and add what rank i sends to incoming[i]."""
    counts = [[sum(x.numel() for x in parts) for parts in blocks] for blocks in (outgoing, incoming)]
    sent, received = (like.new_empty(sum(count)) for count in counts)
    for x, part in _views(outgoing, sent):
        part.copy_(x)
    dist.all_to_all_single(received, sent, counts[1], counts[0], group=shards.mesh.get_group())
    for x, part in _views(incoming, received):
        x += part


def _views(blocks: Blocks, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part of the blocks as [batch, tokens, heads, dim], and the stretch of `flat` that has its values."""
    parts = [x.transpose(1, 2) for x in chain.from_iterable(blocks)]
    for x, values in zip(parts, flat.split([x.numel() for x in parts]), strict=True):
        yield x, values.view(x.shape)
