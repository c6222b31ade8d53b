"""Native Sparse Attention in plain PyTorch: the specification, the oracle of the kernels, and the CPU path.

A *stream* is the packed sequence of one sample's vision tokens; block j holds its indices [j * block_size,
(j + 1) * block_size). Every function takes packed samples and works through *pieces*: adjacent queries of one sample
and the keys of its stream up to the last of them.

Each branch is a softmax over some of these keys. `_Attention` computes it part by part (some keys, and the queries that
see them), so that only what is chosen is multiplied. Where a query sees all keys before it, or a band of them, and no
log-sum-exp is asked for, PyTorch's fused attention does the same. The plainest form of every branch, loops over queries
and heads, is `Brute` in `tests/test_nsa_torch.py`. `nsa_triton.py` has the same functions as kernels.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_CHECKED = ("cu_seqlens_k", "gates", "lse", "blocks", "own_importance", "first", "block_size")  # before heads are split
PIECE = 2048  # queries of a piece, at most
MAX_SCORES = 2**22  # attention scores that are held at a time: 16 MB in fp32
RUN = 64  # queries that share the keys of a window
GATHER_BELOW = 0.7  # share of the keys before the queries that are chosen, below which gathering them is worth it
GATHER_BELOW_16_BIT = 0.35  # the same for bf16 and fp16, which fused attention multiplies faster


def _over_query_heads(function):
    """Give a function the argument `query_heads`: one call for each KV head, with the query heads listed for it."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, query_heads=None, **kwargs):
        if query_heads is None:
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        check_arguments(
            given["q"],
            given["k"],
            given.get("v"),
            given.get("cu_seqlens"),
            query_heads=query_heads,
            **{name: given[name] for name in _CHECKED if name in given},
        )
        parts, start = [], 0
        for g, heads in enumerate(query_heads):
            rows, start = slice(start, start + len(heads)), start + len(heads)
            where = {"k": slice(g, g + 1), "v": slice(g, g + 1), "gates": rows, "lse": rows, "q": list(heads)}
            own = {name: given[name][:, index] for name, index in where.items() if name in given}
            own |= {
                name: given[name][g : g + 1] for name in ("blocks", "own_importance") if given.get(name) is not None
            }
            parts.append(function(**{**given, **own}))
        if isinstance(parts[0], tuple):  # o and lse
            return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
        return torch.cat(parts, 0 if parts[0].dtype == torch.int32 else 1)  # chosen blocks [G, ...], or the gated sum

    return wrapped


@_over_query_heads
def nsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int = 256,
    scale: float | None = None,
) -> torch.Tensor:
    """Gated sum of the compression, selection and window branches (arXiv 2510.02295 §3; arXiv 2502.11089 eq. 5).

    Args:
        q: [N, H, D] queries of all samples one after another; bf16, fp16 or fp32 (fp64 for checks).
        k, v: [M, G, D] keys and values, same dtype; query head h reads KV head h // (H / G).
        gates: [N, H, 3] after the sigmoid, in the order compression, selection, window.
        cu_seqlens: int32 [B + 1], where each sample's queries start and end in N.
        cu_seqlens_k: the same for the keys, when samples have fewer queries than keys; a sample's queries are then
            the last tokens of its stream. Default: `cu_seqlens`.
        query_heads: for each KV head, the query heads that read it, where it is not its own H / G. A query head may
            read several, or one twice; o, lse and gates then have a row for each entry of these lists, in their order,
            in place of H.
        block_size: tokens per block, a power of two of at least 16.
        block_count: blocks that a query selects, at least 3 (the first, the previous and its own are always chosen).
        window_size: keys in the sliding window, the query's own included.
        scale: positive factor on q·k, default D ** -0.5.

    Returns:
        [N, H, D] in the dtype of q. Differentiable in q, k, v and gates; the choice of blocks carries no gradient.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, gates=gates, **sizes)

    def attend(q, k, v, gates):
        compression, selection, window = accumulate(gates).to(k.dtype).unsqueeze(-1).unbind(-2)  # 3 x [C, H, 1]
        o, lse = _compressed(q, k, v, block_size, scale)
        out = compression * o
        if len(k) <= block_count * block_size:
            o = _causal(q, k, v, scale)  # all blocks are chosen
        else:
            chosen = _select(q, k, lse, block_size=block_size, block_count=block_count, scale=scale)
            o, _ = _selected(q, k, v, chosen, block_size, scale, with_lse=False)
        out = torch.addcmul(out, selection, o)
        o, _ = _window(q, k, v, window_size, scale, with_lse=False)
        return (torch.addcmul(out, window, o),)

    chosen_whole = block_count * block_size  # tokens
    return _by_pieces(attend, (q[:0],), q, k, v, cu_seqlens, cu_seqlens_k, gates, cut=chosen_whole)[0]


@_over_query_heads
def compressed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over block means: softmax(q·k̃ᵀ) ṽ over the blocks that end at or before the query.

    Arguments and errors as in `nsa_attention`. Where no block is visible, o is 0 and lse is -inf.

    Returns:
        o [N, H, D] in the dtype of q, and lse [N, H], natural log, fp32 (fp64 for fp64 inputs), without gradient.
    """
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, block_size=block_size, scale=scale)

    def attend(q, k, v):
        return _compressed(q, k, v, block_size, scale)

    return _by_pieces(attend, _nothing(q), q, k, v, cu_seqlens, cu_seqlens_k)


@_over_query_heads
@torch.no_grad()
def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int | None = None,
    spread: bool = False,
    own_importance: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The blocks each query reads: {0, c - 1, c} for own block c, then the most important others.

    The importance of a block before c is its compression probability summed over the query heads of the KV head
    (arXiv 2502.11089 eq. 8-10), which therefore share the choice. Ties go to the lower index.

    Args:
        lse: [N, H] from `compressed_attention`; with `spread`, that of the other keys in the softmax, -inf where there
            are none. The others as in `nsa_attention`.
        window_size: always choose the blocks that this many last tokens overlap, and block 0; default block_size + 1,
            which are the previous and the own block.
        spread: importance is what a block's tokens would get of one softmax over the blocks before c and the keys of
            `lse`, estimated from the mean and variance of each channel of its keys, see `_block_lse`. A mean alone
            hides a single strong key.
        own_importance: [G, N], not negative. If given, no block is always chosen: block c has this importance.

    Block means are not rounded here, as they are in `nsa_triton`: near ties of 16-bit inputs may fall otherwise.

    Returns:
        int32 [G, N, block_count], ascending, padded with -1 where fewer blocks are chosen.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    check_arguments(q, k, None, cu_seqlens, cu_seqlens_k, lse=lse, own_importance=own_importance, **sizes)
    window_size = block_size + 1 if window_size is None else window_size
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    check_block_count(block_count, block_size, window_size)

    def choose(q, k, _, lse, own_importance=None):
        chosen = _select(q, k, lse, own_importance, **sizes, spread=spread)  # [G, C, blocks so far]
        block = torch.arange(chosen.shape[-1], device=q.device)
        blocks = block.where(chosen, len(block)).sort(-1).values[..., :block_count]
        blocks = blocks.masked_fill(blocks == len(block), -1).int()
        return (pad(blocks, (0, block_count - blocks.shape[-1]), value=-1).transpose(0, 1),)

    per_query = (lse,) if own_importance is None else (lse, own_importance.T)
    nothing = lse.new_empty(0, k.shape[1], block_count, dtype=torch.int32)
    (blocks,) = _by_pieces(choose, (nothing,), q, k, k, cu_seqlens, cu_seqlens_k, *per_query)
    return blocks.transpose(0, 1).contiguous()


@_over_query_heads
def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys at or before the query inside its chosen blocks.

    Args:
        blocks: int32 [G, N, any] block indices of each query within its own sample, -1 for none; the others, and
            what is returned, as in `compressed_attention`.
    """
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, blocks=blocks, block_size=block_size, scale=scale)

    def attend(q, k, v, blocks):
        return _selected(q, k, v, _chosen(blocks.transpose(0, 1), len(k), block_size), block_size, scale)

    return _by_pieces(attend, _nothing(q), q, k, v, cu_seqlens, cu_seqlens_k, blocks.transpose(0, 1))


@_over_query_heads
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    window_size: int = 256,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the last `window_size` keys, the query's own included; returns as `compressed_attention`."""
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, window_size=window_size, scale=scale)

    def attend(q, k, v):
        return _window(q, k, v, window_size, scale)

    return _by_pieces(attend, _nothing(q), q, k, v, cu_seqlens, cu_seqlens_k)


@_over_query_heads
def pooled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    first: int,
    block_size: int = 64,
    reverse: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sample over keys and values that stand for `block_size` tokens each: query i sees the first
    (first + i + 1) // block_size of them.

    Args:
        q: [N, H, D]; k, v: [(first + N) // block_size, G, D], as many as the last query sees.
        first: stream index of the first query, at least 0.
        reverse: count queries and keys from their ends, so that a query sees its own and later blocks.

    Returns and raises as `compressed_attention`.
    """
    check_arguments(q, k, v, None, first=first, block_size=block_size, scale=scale)
    dtype, q, k, v = q.dtype, accumulate(q), accumulate(k), accumulate(v)
    if reverse:
        q, k, v = q.flip(0), k.flip(0), v.flip(0)
    with torch.autocast(q.device.type, enabled=False):
        o, lse = _see_means(q, k, v, first, block_size, scale)
    return (o.flip(0).to(dtype), lse.flip(0)) if reverse else (o.to(dtype), lse)


def merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    text_seen: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_text: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int = 256,
    spread: bool = True,
    per_head: bool = False,
    remainder: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """One softmax over the text tokens before a query and the chosen blocks of its stream, without gates.

    Chosen are block 0, those that the window overlaps, then the most important (see `select_blocks`): dense causal
    attention where these are all.

    Args:
        text_k, text_v: [T, G, D] keys and values of the text tokens, sample by sample.
        text_seen: int32 [N], how many text tokens of its sample come before a query; rises within a sample.
        cu_seqlens_text: int32 [B + 1], where each sample's text tokens start and end in T.
        window_size: tokens, the query's own included, whose blocks are always chosen.
        per_head: let each query head choose for itself, and not together with the others of its KV head.
        remainder: let each complete block that is not chosen enter, too, as one key and value, the means of its own,
            whose logit is raised by log(block_size), as if it stood for them all.
        block_count, spread: as in `select_blocks`; the others, and errors, as in `nsa_attention`.

    Returns:
        [N, H, D] in the dtype of q. Differentiable in q, k, v, text_k and text_v; the choice carries no gradient.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, scale=scale, **sizes)
    check_text(q, k, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text)
    if per_head and q.shape[1] > k.shape[1]:
        places = (text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text)
        options = {**sizes, "cu_seqlens_k": cu_seqlens_k, "spread": spread, "remainder": remainder, "scale": scale}
        return head_by_head(merged_attention, q, k, v, *places, **options)
    check_block_count(block_count, block_size, window_size)
    counts = cu_seqlens_text.diff().tolist()
    texts = list(zip(*(accumulate(x).split(counts) for x in (text_k, text_v)), strict=True))
    sample = torch.arange(len(texts), device=q.device).repeat_interleave(cu_seqlens.diff())  # [N]

    def attend(q, k, v, seen, sample):
        n, last = len(k), int(seen[-1])  # of the text seen, as it rises
        index = _stream_index(q, n - len(q))
        text_k, text_v = (x[:last] for x in texts[int(sample[0])])
        text = torch.arange(last, device=q.device) < seen[:, None]  # [C, last]

        def text_part(rows, g):
            return [_Part(_indices(q, rows), slice(0, last), text[rows])]

        if n <= block_count * block_size:
            chosen = text.new_ones(1, 1, (n - 1) // block_size + 1).expand(k.shape[1], len(q), -1)
        else:
            if spread:
                _, lse = _attend(q, text_k, text_v, scale, text_part, last)
            else:
                _, lse = _compressed(q, k, v, block_size, scale)
            chosen = _select(q, k, lse, **sizes, spread=spread, scale=scale)

        if remainder:
            means_k, means_v = (_block_means(x, block_size) for x in (k, v))
            complete = (index[:, None] + 1) // block_size
            rest = (torch.arange(len(means_k), device=q.device) < complete) & ~chosen[..., : len(means_k)]
        k, v = torch.cat([text_k, k]), torch.cat([text_v, v])

        if not remainder and not _is_cheaper_by_blocks(chosen, index, block_size, q.dtype):

            def visible(rows):
                blocks = _visible_keys(chosen[:, rows], index[rows], block_size)  # [G, c, keys]
                return torch.cat([text[rows].expand(len(blocks), -1, -1), blocks], -1)

            return (_masked(q, k, v, visible, scale),)

        if remainder:
            k, v = torch.cat([k, means_k]), torch.cat([v, means_v])

        def parts(rows, g):
            found = text_part(rows, g) + _block_parts(chosen[g, rows], index[rows], block_size, start=last)
            if remainder:
                bias = k.new_full((), math.log(block_size)).where(rest[g, rows], -torch.inf)
                found.append(_Part(_indices(q, rows), slice(last + n, len(k)), bias))
            return found

        width = last + block_size * int(chosen.sum(-1).max()) + (len(k) - last - n)
        return _attend(q, k, v, scale, parts, width)[:1]

    (o,) = _by_pieces(attend, (q[:0],), q, k, v, cu_seqlens, cu_seqlens_k, text_seen, sample)
    return o


# What follows is about one piece: q [C, H, D] of any dtype, the last C of the n tokens of k and v [n, G, D], which are
# fp32 or fp64; o [C, H, D] and lse [C, H] in their dtype.


def _compressed(q, k, v, block_size, scale):
    return _see_means(q, *(_block_means(x, block_size) for x in (k, v)), len(k) - len(q), block_size, scale)


def _see_means(q, k, v, first, block_size, scale):
    """Attention of queries first ... first + C - 1 over the means of the blocks that are complete by then."""
    complete = (_stream_index(q, first)[:, None] + 1) // block_size  # [C, 1]
    block = torch.arange(len(k), device=q.device)

    def parts(rows, g):
        seen = slice(0, (first + rows.stop) // block_size)
        return [_Part(_indices(q, rows), seen, block[seen] < complete[rows])]

    return _attend(q, k, v, scale, parts, len(k))


@torch.no_grad()
def _select(q, k, lse, own_importance=None, *, block_size, block_count, window_size=None, spread=False, scale=None):
    """Which blocks each query chooses, bool [G, C, blocks]: see `select_blocks`; own_importance [C, G]."""
    window_size = block_size + 1 if window_size is None else window_size
    index = _stream_index(q, len(k) - len(q))
    block = torch.arange((len(k) - 1) // block_size + 1, device=q.device)
    means = _block_means(k, block_size)

    def choose(rows):
        i = index[rows, None]
        own = i // block_size  # [c, 1]
        others = lse[rows].unflatten(1, (k.shape[1], -1)).transpose(0, 1).unsqueeze(-1)  # [G, c, r, 1]
        if spread:
            scores = _block_lse(accumulate(q[rows]), k, block_size, scale)  # [G, c, r, complete blocks]
            scores = scores.masked_fill((block[: len(means)] >= own)[:, None], -torch.inf)
            others = torch.cat([scores, others.to(scores.dtype)], -1).logsumexp(-1, keepdim=True)
        else:
            scores = _scores(accumulate(q[rows]), means, scale)
        importance = (scores - others).exp().sum(2)  # [G, c, complete blocks], over the heads of a group
        importance = pad(importance, (0, len(block) - len(means)))
        importance = importance.masked_fill(block >= own, 0)

        if own_importance is None:
            forced = (block == 0) | (block >= (i - window_size + 1) // block_size)
            order = importance.masked_fill(forced, torch.inf)
        else:
            order = torch.where(block == own, own_importance[rows].T.unsqueeze(-1).to(importance.dtype), importance)
        order = order.masked_fill(block > own, -torch.inf)

        least = order.topk(min(block_count, len(block)), -1).values[..., -1:]
        above, ties = order > least, (order == least) & (order > -torch.inf)
        return above | (ties & (ties.cumsum(-1) <= block_count - above.sum(-1, keepdim=True)))

    return torch.cat([choose(rows) for rows in _slices(len(q), MAX_SCORES // (q.shape[1] * len(block)))], 1)


def _selected(q, k, v, chosen, block_size, scale, with_lse=True):
    """Attention over the keys up to the query in its blocks, chosen bool [G, C, blocks]; lse is None if not asked for.

    Rows of GEMM are gathered, block by block; fused attention that masks is faster if most keys are seen.
    """
    index = _stream_index(q, len(k) - len(q))
    if not with_lse and not _is_cheaper_by_blocks(chosen, index, block_size, q.dtype):
        return _masked(q, k, v, lambda rows: _visible_keys(chosen[:, rows], index[rows], block_size), scale), None

    def parts(rows, g):
        if q.device.type != "cpu":  # a GPU would wait for itself at every block
            visible = _visible_keys(chosen[g : g + 1, rows], index[rows], block_size)[0]
            return [_Part(_indices(q, rows), slice(0, visible.shape[-1]), visible)]
        return _block_parts(chosen[g, rows], index[rows], block_size)

    return _attend(q, k, v, scale, parts, block_size * int(chosen.sum(-1).max()))


def _is_cheaper_by_blocks(chosen, index, block_size, dtype):
    """Whether products of gathered rows take less time than masked ones of all, for queries at these indices."""
    if chosen.device.type != "cpu":
        return False
    share = chosen.sum() / (len(chosen) * (index // block_size + 1).sum())
    return bool(share < (GATHER_BELOW if dtype in (torch.float32, torch.float64) else GATHER_BELOW_16_BIT))


def _block_parts(chosen, index, block_size, start=0):
    """A part for each block that a query chose, of one KV head: chosen bool [c, blocks], index [c] of the queries."""
    first, n, parts = int(index[0]), int(index[-1]) + 1, []
    for j, is_row in enumerate(chosen.T.contiguous()):
        rows, stop = is_row.nonzero().squeeze(1), min((j + 1) * block_size, n)
        if len(rows) == 0 or j * block_size >= n:
            continue
        bias = None
        if stop > first + 1:  # keys of the block come after some of the queries
            key = torch.arange(j * block_size, stop, device=index.device)
            bias = key <= index[rows, None]
        parts.append(_Part(rows, slice(start + j * block_size, start + stop), bias))
    return parts


def _window(q, k, v, window_size, scale, with_lse=True):
    """Attention over the last keys; lse is None if not asked for."""
    first = len(k) - len(q)
    if with_lse:
        index = _stream_index(q, first)

        def parts(rows, g):
            seen = slice(max(0, first + rows.start - window_size + 1), first + rows.stop)
            key = torch.arange(seen.start, seen.stop, device=q.device)
            i = index[rows, None]
            return [_Part(_indices(q, rows), seen, (key <= i) & (key > i - window_size))]

        return _attend(q, k, v, scale, parts, step=RUN)

    # The queries whose window holds all keys before them, then whole runs, then what is left.
    dense = min(max(window_size - first, 0), len(q))
    rest = (len(q) - dense) % RUN
    outs = [] if dense == 0 else [_causal(q[:dense], k[: first + dense], v[: first + dense], scale)]
    for start, stop, run in ((dense, len(q) - rest, RUN), (len(q) - rest, len(q), rest)):
        if start < stop:
            keys = slice(first + start - window_size + 1, first + stop)
            outs.append(_bands(q[start:stop], k[keys], v[keys], run, scale))
    return torch.cat(outs), None


def _bands(q, k, v, run, scale):
    """Window attention of runs of `run` queries, all with a whole window: k and v begin with that of the first."""
    window_size = len(k) - len(q) + 1
    groups, dim = k.shape[1:]
    q = q.view(-1, run, groups, q.shape[1] // groups, dim).permute(0, 2, 3, 1, 4)  # [runs, G, r, run, D]
    k, v = (
        x.to(q.dtype).unfold(0, run + window_size - 1, run).transpose(2, 3)  # [runs, G, keys, D], without a copy
        for x in (k, v)
    )
    i, j = torch.arange(run, device=q.device)[:, None], torch.arange(run + window_size - 1, device=q.device)
    visible = ((j >= i) & (j < i + window_size)).repeat(q.shape[2], 1)  # [r * run, keys]
    o = scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=visible, scale=scale)
    o = o.unflatten(2, (-1, run)).permute(0, 3, 1, 2, 4)  # [runs, run, G, r, D]
    return accumulate(o.flatten(2, 3).flatten(0, 1))


def _causal(q, k, v, scale):
    """Attention over all keys up to the query."""
    if len(q) == len(k):
        return _fused(q, k, v, scale, is_causal=True)
    index, key = _stream_index(q, len(k) - len(q)), torch.arange(len(k), device=q.device)
    return _masked(q, k, v, lambda rows: (key[: index[rows][-1] + 1] <= index[rows, None])[None], scale)


def _masked(q, k, v, visible, scale):
    """Attention where visible(rows) gives the mask of a few queries: bool [G or 1, c, keys up to the last of them]."""
    outs = []
    for rows in _slices(len(q), 4 * RUN):
        mask = visible(rows)
        m = mask.shape[-1]
        outs.append(_fused(q[rows], k[:m], v[:m], scale, attn_mask=mask.unsqueeze(1)))
    return torch.cat(outs)


def _fused(q, k, v, scale, **mask):
    """PyTorch's attention. KV heads are its batch, so that none is copied for its query heads."""
    q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [G, r, C, D]
    k, v = (x.to(q.dtype).transpose(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    o = scaled_dot_product_attention(q, k, v, scale=scale, **mask)
    return accumulate(o.permute(2, 0, 1, 3).flatten(1, 2))


class _Part(NamedTuple):
    """Some queries of a chunk, and the keys that they see, except where `bias` hides one."""

    rows: torch.Tensor  # int64 [m], of the chunk
    keys: slice
    bias: torch.Tensor | None  # bool [m, keys], False where hidden, or floating-point, to be added to the logits


def _attend(q, k, v, scale, parts, max_keys=0, step=None):
    """Softmax over parts; parts(rows, g) lists them for a slice of the queries and a KV head. Returns o, lse.

    max_keys: the most that a query sees, by which chunks of queries are cut if `step` does not say how.
    """
    heads, groups = q.shape[1], k.shape[1]
    step = step or MAX_SCORES // max(1, max_keys * heads // groups)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunks = [(rows, g, parts(rows, g)) for rows in _slices(len(q), step) for g in range(groups)]
    chunks = [(rows, g, [part for part in found if part.keys.start < part.keys.stop]) for rows, g, found in chunks]
    return _Attention.apply(accumulate(q), k, v, scale, chunks)


class _Attention(torch.autograd.Function):
    """o = Σ p_j v_j and lse = log Σ exp(x_j) with x_j = scale q·k_j + bias_j and p_j = exp(x_j - lse), over the keys j
    of all parts in which a query is a row."""

    @staticmethod
    def forward(ctx, q, k, v, scale, chunks):
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [G, n, D]
        for queries, heads, g, parts in _with_heads(chunks, q.shape[1] // len(k)):
            x = q[queries, heads] * scale  # [c, r, D]
            logits = [_logits(x, k[g], part) for part in parts]  # each [m, r, keys]
            sizes, rows = [len(part.rows) for part in parts], torch.cat([part.rows for part in parts])
            tops = torch.cat([part.amax(-1) for part in logits])
            top = lse[queries, heads].scatter_reduce(0, rows[:, None].expand_as(tops), tops, "amax")
            top = top.masked_fill(top == -torch.inf, 0)  # the row sees nothing: all p are 0

            out, sums = torch.zeros_like(x), []
            for part, p, shift in zip(parts, logits, top.index_select(0, rows).split(sizes), strict=True):
                p = p.sub_(shift.unsqueeze(-1)).exp_()
                sums.append(p.sum(-1))
                out.index_add_(0, part.rows, _rows_times(p, v[g, part.keys]))
            total = torch.zeros_like(top).index_add_(0, rows, torch.cat(sums))
            o[queries, heads] = out.div_(total.masked_fill(total == 0, 1).unsqueeze(-1))
            lse[queries, heads] = top + total.log()
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.chunks = scale, chunks
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        """dv_j = Σ p_j do, dx_j = p_j (do·v_j - do·o), dq = scale Σ dx_j k_j, dk_j = scale Σ dx_j q."""
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # autograd runs this under the autocast of the loss.
        with torch.autocast(q.device.type, enabled=False):
            for queries, heads, g, parts in _with_heads(ctx.chunks, q.shape[1] // len(k)):
                x, grad = q[queries, heads] * ctx.scale, do[queries, heads].contiguous()
                own = (grad * o[queries, heads]).sum(-1, keepdim=True)
                shift = lse[queries, heads].unsqueeze(-1)
                shift = shift.masked_fill(shift == -torch.inf, 0)
                out = torch.zeros_like(x)
                for part in parts:
                    rows, keys, _ = part
                    p = _logits(x, k[g], part).sub_(shift.index_select(0, rows)).exp_()
                    grad_rows = grad.index_select(0, rows)
                    dx = _rows_times(grad_rows, v[g, keys].T).sub_(own.index_select(0, rows)).mul_(p)
                    out.index_add_(0, rows, _rows_times(dx, k[g, keys]))
                    dk[g, keys].addmm_(dx.flatten(0, 1).T, x.index_select(0, rows).flatten(0, 1))
                    dv[g, keys].addmm_(p.flatten(0, 1).T, grad_rows.flatten(0, 1))
                dq[queries, heads] = out.mul_(ctx.scale)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None


def _with_heads(chunks, r):
    """(queries, their heads, KV head, parts) of chunks that have parts."""
    return [(rows, slice(g * r, (g + 1) * r), g, parts) for rows, g, parts in chunks if parts]


def _logits(x, k, part):
    """x [c, r, D], k [n, D] -> [m, r, keys]"""
    logits = _rows_times(x.index_select(0, part.rows), k[part.keys].T)
    if part.bias is None:
        return logits
    bias = part.bias.unsqueeze(1)
    return logits.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else logits.add_(bias)


def _rows_times(x, y):
    """x [m, r, a], y [a, b] -> [m, r, b]; one product, of m * r rows"""
    return (x.flatten(0, 1) @ y).unflatten(0, x.shape[:2])


# Pieces


def _by_pieces(attend, nothing, q, k, v, cu_seqlens, cu_seqlens_k, *per_query, cut=0):
    """attend(q, k, v, *per_query) -> tuple of [C, ...] for pieces of at most `PIECE` queries of a sample, joined.

    k and v are those up to the last query, fp32 or fp64, so that their gradients are summed in it. The first result
    gets the dtype of q. nothing: the results if there are no queries. cut: a stream index that no piece crosses.
    """
    dtype, k, v = q.dtype, accumulate(k), accumulate(v)
    sizes, keys = [], []
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for count, (start, stop) in zip(cu_seqlens.diff().tolist(), pairwise(cu_seqlens_k.tolist()), strict=True):
        i = stop - start - count
        while i < stop - start:
            end = min(stop - start, (i // PIECE + 1) * PIECE, cut if i < cut else stop - start)
            sizes.append(end - i)
            keys.append(slice(start, start + end))
            i = end
    if not sizes:
        return nothing
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for own_keys, *queries in zip(keys, *(x.split(sizes) for x in (q, *per_query)), strict=True):
            o, *rest = attend(queries[0], k[own_keys], v[own_keys], *queries[1:])
            outs.append((o.to(dtype) if o.is_floating_point() else o, *rest))
    return tuple(torch.cat(x) for x in zip(*outs, strict=True))


def _nothing(q):
    return q[:0], accumulate(q.detach()).new_empty(0, q.shape[1])


def _slices(n, step):
    step = max(1, step)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _stream_index(q, first):
    return torch.arange(first, first + len(q), device=q.device)


def _indices(q, rows):
    return torch.arange(rows.stop - rows.start, device=q.device)


def _chosen(blocks, n, block_size):
    """int32 [G, C, any] block indices of queries that reach n keys -> bool [G, C, blocks]"""
    count = (n - 1) // block_size + 1
    index = blocks.long().masked_fill((blocks < 0) | (blocks >= count), count)
    return blocks.new_zeros(*blocks.shape[:2], count + 1, dtype=torch.bool).scatter_(2, index, True)[..., :count]


def _visible_keys(chosen, index, block_size):
    """bool [G, c, blocks] -> [G, c, keys up to the last query], without those after each query"""
    key = torch.arange(int(index[-1]) + 1, device=chosen.device)
    return chosen.repeat_interleave(block_size, -1)[..., : len(key)] & (key <= index[:, None])


def check_block_count(block_count: int, block_size: int, window_size: int) -> None:
    """Raise a ValueError if `block_count` is below the number of blocks that are always chosen for a window."""
    least = 3 + (window_size - 2) // block_size  # the first block, and what a window overlaps at most
    if block_count < least:
        raise ValueError(
            f"block_count must be at least {least}, the blocks that are always chosen for a window of {window_size}: "
            f"got {block_count}"
        )


def head_by_head(attention, q: torch.Tensor, k: torch.Tensor, *args, **options) -> torch.Tensor:
    """attention(q, k, ...) of one query head of each KV head at a time, [N, H, D]."""
    turns = q.unflatten(1, (k.shape[1], -1)).unbind(2)
    return torch.stack([attention(x, k, *args, **options) for x in turns], 2).flatten(1, 2)


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    gates: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    own_importance: torch.Tensor | None = None,
    query_heads: Sequence[Sequence[int]] | None = None,
    block_size: int | None = None,
    block_count: int | None = None,
    window_size: int | None = None,
    first: int | None = None,
    scale: float | None = None,
    read_lengths: bool = True,
) -> None:
    """Raise a ValueError that names the first argument which does not fit the others.

    cu_seqlens: None for `pooled_attention`, which has `first`.
    read_lengths: check the values of cu_seqlens, too, which waits for the device that they are on.
    """
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor [tokens, heads, dim], got {q.dtype} {list(q.shape)}")
    n, heads, dim = q.shape
    if k.ndim != 3 or k.shape[2] != dim:
        raise ValueError(f"k must be [tokens, kv heads, {dim}] like q {list(q.shape)}, got {list(k.shape)}")
    groups, rows = k.shape[1], heads
    if query_heads is not None:
        if len(query_heads) != groups or not all(_are_heads(listed, heads) for listed in query_heads):
            raise ValueError(
                f"query_heads must hold, for each of {groups} KV heads, at least one query head in 0 ... {heads - 1}, "
                f"got {query_heads}"
            )
        rows = sum(map(len, query_heads))
    elif groups == 0 or heads % groups:
        raise ValueError(f"the heads of q must be a multiple of the heads of k, got {heads} and {groups}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if gates is not None and (gates.shape != (n, rows, 3) or gates.device != q.device):
        raise ValueError(f"gates must be {[n, rows, 3]} on {q.device}, got {list(gates.shape)} on {gates.device}")
    if lse is not None and (lse.shape != (n, rows) or not lse.is_floating_point() or lse.device != q.device):
        got = f"{lse.dtype} {list(lse.shape)} on {lse.device}"
        raise ValueError(f"lse must be floating-point {[n, rows]} on {q.device}, got {got}")
    if blocks is not None:
        fits = blocks.ndim == 3 and blocks.shape[:2] == (groups, n)
        if not fits or blocks.dtype != torch.int32 or blocks.device != q.device:
            got = f"{blocks.dtype} {list(blocks.shape)} on {blocks.device}"
            raise ValueError(f"blocks must be int32 [{groups}, {n}, count] on {q.device}, got {got}")
    if own_importance is not None and (own_importance.shape != (groups, n) or own_importance.device != q.device):
        got = f"{list(own_importance.shape)} on {own_importance.device}"
        raise ValueError(f"own_importance must be {[groups, n]} on {q.device}, got {got}")
    if block_size is not None and (block_size < 16 or block_size & (block_size - 1)):
        raise ValueError(f"block_size must be a power of two of at least 16, got {block_size}")
    if block_count is not None and (not isinstance(block_count, int) or block_count < 3):
        raise ValueError(
            f"block_count must be an integer of at least 3 (first, previous and own block), got {block_count}"
        )
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if first is not None:
        if first < 0:
            raise ValueError(f"first must be at least 0, got {first}")
        if len(k) != (first + n) // block_size:
            raise ValueError(
                f"k must have (first + queries) // block_size = {(first + n) // block_size} rows, got {len(k)}"
            )
        return
    _check_lengths("cu_seqlens", cu_seqlens, q, "q", read_lengths)
    if cu_seqlens_k is not None:
        _check_lengths("cu_seqlens_k", cu_seqlens_k, k, "k", read_lengths)
        same_samples = cu_seqlens_k.shape == cu_seqlens.shape
        if not same_samples or (read_lengths and (cu_seqlens_k.diff() < cu_seqlens.diff()).any()):
            raise ValueError(
                "cu_seqlens_k must describe the samples of cu_seqlens, each with at least as many keys as queries, "
                f"got {cu_seqlens_k.tolist()} and {cu_seqlens.tolist()}"
            )
    elif k.shape[0] != n:
        raise ValueError(f"k must have {n} tokens like q where cu_seqlens_k is not given, got {k.shape[0]}")


def check_text(q, k, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, *, read_lengths: bool = True) -> None:
    """The same for what `merged_attention` takes of the text."""
    for name, x in (("text_k", text_k), ("text_v", text_v)):
        if x.ndim != 3 or x.shape[1:] != k.shape[1:] or x.shape[0] != text_k.shape[0]:
            raise ValueError(f"{name} must be [text tokens, {k.shape[1]}, {k.shape[2]}] like k, got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    _check_lengths("cu_seqlens_text", cu_seqlens_text, text_k, "text_k", read_lengths)
    if cu_seqlens_text.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_text must describe the {len(cu_seqlens) - 1} samples of cu_seqlens, got "
            f"{len(cu_seqlens_text) - 1}"
        )
    if text_seen.dtype != torch.int32 or text_seen.shape != q.shape[:1] or text_seen.device != q.device:
        got = f"{text_seen.dtype} {list(text_seen.shape)} on {text_seen.device}"
        raise ValueError(f"text_seen must be int32 [{q.shape[0]}] on {q.device}, got {got}")


def _are_heads(listed: Sequence[int], heads: int) -> bool:
    return len(listed) > 0 and all(isinstance(h, int) and 0 <= h < heads for h in listed)


def _check_lengths(name: str, cu_seqlens: torch.Tensor, counted: torch.Tensor, counted_name: str, read: bool) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must be int32 [samples + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != counted.device:
        raise ValueError(f"{name} must be on {counted.device} like {counted_name}, got {cu_seqlens.device}")
    if not read:
        return
    values, n = cu_seqlens.tolist(), len(counted)
    if values[0] != 0 or values[-1] != n or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to the {n} tokens of {counted_name}, got {values}")


def accumulate(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that softmax and sums are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _block_means(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """[n, G, D] -> [complete blocks, G, D]"""
    count = len(x) // block_size
    return x[: count * block_size].unflatten(0, (count, block_size)).mean(1)


def _block_lse(q: torch.Tensor, k: torch.Tensor, block_size: int, scale: float | None) -> torch.Tensor:
    """Estimated log-sum-exp of the logits of each block's keys, [G, C, r, complete blocks].

    The logits of a query are taken as `block_size` draws from a normal distribution of mean q·μ and variance
    σ² = Σ_d q_d² var_d, for the mean μ and the variances var of the keys' channels. Their log-sum-exp is then about
    q·μ + σ²/2 + ln S up to σ = (2 ln S)^½, and beyond, where the largest draw is all that counts, q·μ + σ (2 ln S)^½
    (the random energy model, Derrida, Phys. Rev. B 24, 2613, 1981).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    most = math.sqrt(2 * math.log(block_size))
    count = len(k) // block_size
    blocks = k[: count * block_size].unflatten(0, (count, block_size))
    means = blocks.mean(1)
    variance = _scores(q.square(), (blocks - means[:, None]).square().mean(1), scale * scale)
    spread = torch.where(variance < most * most, (variance + most * most) / 2, most * variance.sqrt())
    return _scores(q, means, scale) + spread


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q [C, H, D], k [m, G, D] -> [G, C, H / G, m]"""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("cgrd,mgd->gcrm", q.unflatten(1, (k.shape[1], -1)), k) * scale
