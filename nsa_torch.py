"""Native Sparse Attention in plain PyTorch: the specification, the oracle of the kernels, and the CPU path.

A *stream* is the packed sequence of one sample's vision tokens; block j holds its indices [j * block_size,
(j + 1) * block_size). Every function takes packed samples and works through chunks of queries of at most
`MAX_SCORES` attention scores, in training too (chunks are recomputed in the backward pass).
`nsa_triton.py` has the same functions as kernels; `modeling_videonsa.py` calls whichever fits the device.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint

_CHECKED = ("cu_seqlens_k", "gates", "lse", "blocks", "own_importance", "first", "block_size")  # before heads are split
MAX_SCORES = 2**25  # attention scores of a chunk, over all heads; 128 MB in fp32, of which about five are in use


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
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, gates=gates, window_size=window_size, scale=scale)
    dtype, q, k, v = q.dtype, accumulate(q), accumulate(k), accumulate(v)
    lengths = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    blocking = {"block_size": block_size, "scale": scale}
    g_cmp, g_slc, g_win = gates.to(q.dtype).unsqueeze(-1).unbind(-2)  # 3 x [N, H, 1]
    o, lse = compressed_attention(q, k, v, **lengths, **blocking)
    out = g_cmp * o
    blocks = select_blocks(q, k, lse, **lengths, **blocking, block_count=block_count)
    o, _ = selected_attention(q, k, v, blocks, **lengths, **blocking)
    out = out + g_slc * o  # branch by branch, so that not all are held at once
    o, _ = window_attention(q, k, v, **lengths, window_size=window_size, scale=scale)
    return (out + g_win * o).to(dtype)


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

    def attend(q, k, v, first):
        i = _stream_index(q, first)
        k, v = (_block_means(x[: first + len(q)], block_size) for x in (k, v))
        visible = torch.arange(len(k), device=q.device) < ((i + 1) // block_size)[:, None]
        return _softmax_attention(q, k, v, visible[None], scale)

    return _over_chunks(attend, q, k, v, cu_seqlens, cu_seqlens_k, lambda n: n // block_size)


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
    block_count: int | float = 32,
    window_size: int | None = None,
    mass: float = 1.0,
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
        block_count: a number, or as a float in (0, 1] the share of the blocks 0 ... c, rounded down (in steps of 1 /
            10,000, and never below the blocks that are always chosen).
        window_size: always choose the blocks that this many last tokens overlap, and block 0; default block_size + 1,
            which are the previous and the own block.
        mass: choose no more of the others once all chosen hold this share of the importance of the blocks before c.
        spread: importance is what a block's tokens would get of one softmax over the blocks before c and the keys of
            `lse`, estimated from the mean and variance of each channel of its keys, see `_block_lse`. A mean alone
            hides a single strong key.
        own_importance: [G, N], not negative. If given, no block is always chosen: block c has this importance.

    Block means are not rounded here, as they are in `nsa_triton`: near ties of 16-bit inputs may fall otherwise.

    Returns:
        int32 [G, N, `most_blocks`], ascending, padded with -1 where fewer blocks are chosen.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    check_arguments(q, k, None, cu_seqlens, cu_seqlens_k, lse=lse, own_importance=own_importance, mass=mass, **sizes)
    window_size = block_size + 1 if window_size is None else window_size
    width = most_blocks(len(k), block_size, block_count, window_size)

    def choose(q, k, lse, first, own_importance):
        i = _stream_index(q, first)[:, None]
        own = i // block_size  # [C, 1]
        block = torch.arange((first + len(q) - 1) // block_size + 1, device=q.device)
        lse = lse.unflatten(1, (k.shape[1], -1)).transpose(0, 1).unsqueeze(-1)  # [G, C, r, 1]
        keys = k[: first + len(q)]
        if spread:
            scores = _block_lse(q, keys, block_size, scale)  # [G, C, r, complete blocks]
            scores = scores.masked_fill((block[: scores.shape[-1]] >= own)[:, None], -torch.inf)
            lse = torch.cat([scores, lse.to(scores.dtype)], -1).logsumexp(-1, keepdim=True)
        else:
            scores = _scores(q, _block_means(keys, block_size), scale)
        importance = (scores - lse).exp().sum(2)  # [G, C, blocks], over the heads of a group
        importance = torch.nn.functional.pad(importance, (0, len(block) - scores.shape[-1]))  # own may be incomplete
        importance = importance.masked_fill(block >= own, 0)
        if own_importance is None:
            forced = (block == 0) | (block >= (i - window_size + 1) // block_size)
            order = importance.masked_fill(forced, torch.inf)
        else:
            order = torch.where(block == own, own_importance.unsqueeze(-1).to(importance.dtype), importance)
        best = order.masked_fill(block > own, -torch.inf).sort(dim=-1, descending=True, stable=True)
        chosen = (best.values > -torch.inf) & (block < blocks_per_query(own, block_size, block_count, window_size))
        if mass < 1:
            held = importance.gather(-1, best.indices)
            before = held.cumsum(-1) - held  # of the more important ones
            enough = before >= mass * importance.sum(-1, keepdim=True)
            chosen &= ~enough | (best.values == torch.inf)
        chosen = best.indices.masked_fill(~chosen, len(block))[..., :width].sort(-1).values
        chosen = chosen.masked_fill(chosen == len(block), -1)
        return torch.nn.functional.pad(chosen, (0, width - chosen.shape[-1]), value=-1).int()

    chunks = _chunks(cu_seqlens, cu_seqlens_k, lambda n: _rows(q, n // block_size + 1))
    q, k = accumulate(q), accumulate(k)
    with torch.autocast(q.device.type, enabled=False):
        parts = [
            choose(q[rows], k[keys], lse[rows], first, None if own_importance is None else own_importance[:, rows])
            for rows, keys, first in chunks
        ]
    return torch.cat([q.new_empty(k.shape[1], 0, width, dtype=torch.int32), *parts], dim=1)


def blocks_per_query(own, block_size: int, block_count: int | float, window_size: int):
    """How many blocks a query with the own block `own` (a number or a tensor) may choose, see `select_blocks`."""
    if not isinstance(block_count, float):
        return block_count
    least = 3 + (window_size - 2) // block_size  # the first block, and what a window overlaps at most
    share = (own + 1) * round(block_count * 10_000) // 10_000  # in integers, the same on every device
    return max(share, least) if isinstance(share, int) else share.clamp(min=least)


def most_blocks(n_keys: int, block_size: int, block_count: int | float, window_size: int) -> int:
    """How many blocks a choice has room for: `block_count`, or for a share a power of two.

    Raises:
        ValueError: `block_count` is below the number of blocks that are always chosen.
    """
    least = 3 + (window_size - 2) // block_size
    if not isinstance(block_count, float) and block_count < least:
        raise ValueError(
            f"block_count must be at least {least}, the blocks that are always chosen for a window of {window_size}: "
            f"got {block_count}"
        )
    last = max(0, n_keys - 1) // block_size
    most = blocks_per_query(last, block_size, block_count, window_size)
    return most if most is block_count else 1 << (most - 1).bit_length()


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

    def attend(q, k, v, first, blocks):
        n = first + len(q)
        visible = _visible_keys(_chosen(blocks, n, block_size), n, block_size)
        return _softmax_attention(q, k[:n], v[:n], visible, scale)

    return _over_chunks(attend, q, k, v, cu_seqlens, cu_seqlens_k, lambda n: n, blocks=blocks)


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
    span = max(window_size, 64)  # queries per chunk: as many as the window has keys, so that half the scores count

    def attend(q, k, v, first):
        i = _stream_index(q, first)[:, None]
        start, stop = max(0, first - window_size + 1), first + len(q)
        j = torch.arange(start, stop, device=q.device)
        return _softmax_attention(q, k[start:stop], v[start:stop], ((j <= i) & (j > i - window_size))[None], scale)

    return _over_chunks(attend, q, k, v, cu_seqlens, cu_seqlens_k, lambda n: min(n, 2 * span), max_rows=span)


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

    def attend(q, k, v, first):
        seen = (_stream_index(q, first) + 1) // block_size
        return _softmax_attention(q, k, v, (torch.arange(len(k), device=q.device) < seen[:, None])[None], scale)

    if reverse:
        q, k, v = q.flip(0), k.flip(0), v.flip(0)
    cu_seqlens, cu_seqlens_k = torch.tensor([0, len(q)]), torch.tensor([0, first + len(q)])
    o, lse = _over_chunks(attend, q, k, v, cu_seqlens, cu_seqlens_k, lambda n: n // block_size)
    return (o.flip(0), lse.flip(0)) if reverse else (o, lse)


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
    block_count: int | float = 32,
    window_size: int = 256,
    mass: float = 1.0,
    spread: bool = True,
    per_head: bool = False,
    remainder: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """One softmax over the text tokens before a query and the chosen blocks of its stream, without gates.

    Chosen are block 0, those that the window overlaps, then the most important (see `select_blocks`): dense causal
    attention where these are all, which `block_count` = 1.0 always gives.

    Args:
        text_k, text_v: [T, G, D] keys and values of the text tokens, sample by sample.
        text_seen: int32 [N], how many text tokens of its sample come before a query; rises within a sample.
        cu_seqlens_text: int32 [B + 1], where each sample's text tokens start and end in T.
        window_size: tokens, the query's own included, whose blocks are always chosen.
        per_head: let each query head choose for itself, and not together with the others of its KV head.
        remainder: let each complete block that is not chosen enter, too, as one key and value, the means of its own,
            whose logit is raised by log(block_size), as if it stood for them all.
        block_count, mass, spread: as in `select_blocks`; the others, and errors, as in `nsa_attention`.

    Returns:
        [N, H, D] in the dtype of q. Differentiable in q, k, v, text_k and text_v; the choice carries no gradient.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "mass": mass}
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, scale=scale, **sizes)
    check_text(q, k, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text)
    lengths = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    if per_head and q.shape[1] > k.shape[1]:
        places = (text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text)
        options = {**sizes, "cu_seqlens_k": cu_seqlens_k, "spread": spread, "remainder": remainder, "scale": scale}
        return head_by_head(merged_attention, q, k, v, *places, **options)
    stream = k

    # Keys of a sample: its text, then its stream.
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    counts = [x.diff().tolist() for x in (cu_seqlens_text, cu_seqlens_k)]
    k, v = (
        torch.cat([part for pair in zip(t.split(counts[0]), x.split(counts[1]), strict=True) for part in pair])
        for t, x in ((text_k, k), (text_v, v))
    )
    text_count = cu_seqlens_text.diff().repeat_interleave(cu_seqlens.diff())  # [N], of the whole sample
    over_chunks = functools.partial(
        _over_chunks, q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k + cu_seqlens_text,
        keys_per_query=lambda n: n, per_query=(text_seen, text_count),
    )  # fmt: skip

    def attend_text(q, k, v, first, seen, text_count):
        text = torch.arange(int(text_count[0]), device=q.device)
        return _softmax_attention(q, k[: len(text)], v[: len(text)], (text < seen[:, None])[None], scale)

    blocks = None
    if block_count != 1.0 or isinstance(block_count, int):
        with torch.no_grad():
            if spread:
                _, lse = over_chunks(attend_text)
            else:
                _, lse = compressed_attention(q, stream, stream, **lengths, block_size=block_size, scale=scale)
            blocks = select_blocks(q, stream, lse, **lengths, **sizes, spread=spread, scale=scale)

    def attend(q, k, v, first, seen, text_count, blocks=None):
        texts = int(text_count[0])
        first, n = first - texts, first + len(q) - texts
        if blocks is None:
            chosen = torch.ones(1, len(q), (n - 1) // block_size + 1, dtype=torch.bool, device=q.device)
        else:
            chosen = _chosen(blocks, n, block_size)
        text = (torch.arange(texts, device=q.device) < seen[:, None]).expand(len(chosen), -1, -1)
        visible, bias = torch.cat([text, _visible_keys(chosen, n, block_size)], -1), None
        k, v = k[: texts + n], v[: texts + n]
        if remainder:
            means = [_block_means(x[texts:], block_size) for x in (k, v)]
            complete = (_stream_index(q, first)[:, None] + 1) // block_size
            others = (torch.arange(len(means[0]), device=q.device) < complete) & ~chosen[..., : len(means[0])]
            k, v = (torch.cat([x, mean]) for x, mean in zip((k, v), means, strict=True))
            visible = torch.cat([visible, others], -1)
            bias = torch.cat([q.new_zeros(texts + n), q.new_full((len(means[0]),), math.log(block_size))])
        return _softmax_attention(q, k, v, visible, scale, bias)

    return over_chunks(attend, blocks=blocks)[0]


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
    block_count: int | float | None = None,
    window_size: int | None = None,
    first: int | None = None,
    mass: float | None = None,
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
    if isinstance(block_count, float) and not 0 < block_count <= 1:
        raise ValueError(f"block_count as a share (a float) must be above 0 and at most 1, got {block_count}")
    if isinstance(block_count, int) and block_count < 3:
        raise ValueError(f"block_count must be at least 3 (first, previous and own block), got {block_count}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    if mass is not None and not 0 < mass <= 1:
        raise ValueError(f"mass must be above 0 and at most 1, got {mass}")
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


def _stream_index(q: torch.Tensor, first: int) -> torch.Tensor:
    return torch.arange(first, first + len(q), device=q.device)


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


def _chosen(blocks: torch.Tensor, n: int, block_size: int) -> torch.Tensor:
    """int32 [G, C, any] block indices of queries that reach n keys -> bool [G, C, blocks]"""
    count = (n - 1) // block_size + 1
    index = blocks.long().masked_fill((blocks < 0) | (blocks >= count), count)
    return blocks.new_zeros(*blocks.shape[:2], count + 1, dtype=torch.bool).scatter_(2, index, True)[..., :count]


def _visible_keys(chosen: torch.Tensor, n: int, block_size: int) -> torch.Tensor:
    """bool [G, C, blocks] -> [G, C, n], without the keys that come after each of the last C of n queries"""
    j = torch.arange(n, device=chosen.device)
    return chosen.repeat_interleave(block_size, -1)[..., :n] & (j <= j[n - chosen.shape[1] :, None])


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q [C, H, D], k [m, G, D] -> [G, C, H / G, m]"""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("cgrd,mgd->gcrm", q.unflatten(1, (k.shape[1], -1)), k) * scale


def _softmax_attention(q, k, v, visible, scale, bias=None):
    """q [C, H, D], k and v [m, G, D], visible bool [G or 1, C, m], bias [m] -> o [C, H, D], lse [C, H]."""
    scores = _scores(q, k, scale)
    scores = (scores if bias is None else scores + bias).masked_fill(~visible.unsqueeze(2), -torch.inf)
    lse = scores.logsumexp(-1)  # [G, C, r]
    p = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()  # all 0 where nothing is visible
    o = torch.einsum("gcrm,mgd->cgrd", p, v)
    return o.flatten(1, 2), lse.detach().transpose(0, 1).flatten(1)


def _rows(q: torch.Tensor, keys_per_query: int) -> int:
    """How many queries fit into `MAX_SCORES`."""
    return max(1, MAX_SCORES // (q.shape[1] * max(1, keys_per_query)))


def _chunks(cu_seqlens, cu_seqlens_k, rows) -> list[tuple[slice, slice, int]]:
    """(queries, keys of their sample, stream index of the first query) for chunks; rows(keys reached) queries fit."""
    cu_seqlens, cu_seqlens_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    chunks = []
    for (start, stop), (key_start, key_stop) in zip(pairwise(cu_seqlens), pairwise(cu_seqlens_k), strict=True):
        first = key_stop - key_start - (stop - start)
        a = start
        while a < stop:
            seen = first + a - start
            # By the keys that a chunk reaches, so that chunks are of one size: malloc cannot reuse ever growing ones.
            step = min(rows(seen + min(rows(seen + 1), stop - a)), stop - a)
            chunks.append((slice(a, a + step), slice(key_start, key_stop), seen))
            a += step
    return chunks


def _over_chunks(attend, q, k, v, cu_seqlens, cu_seqlens_k, keys_per_query, per_query=(), blocks=None, max_rows=None):
    """Run attend(q, k, v, first[, of tensors per_query][, blocks]) -> (o, lse) chunk by chunk; join what it gives."""

    def rows(n):
        fit = _rows(q, keys_per_query(n))
        return fit if max_rows is None else min(fit, max_rows)

    chunks = _chunks(cu_seqlens, cu_seqlens_k, rows)
    sizes = [(r.stop - r.start, first) for r, _, first in chunks]
    scores = sum(n * keys_per_query(first + n) for n, first in sizes) * q.shape[1]
    recompute = scores > MAX_SCORES and torch.is_grad_enabled()
    recomputed = {"use_reentrant": False, "preserve_rng_state": False}
    dtype, q, k, v = q.dtype, accumulate(q), accumulate(k), accumulate(v)
    outs = [(q[:0], q.new_empty(0, q.shape[1]))]
    with torch.autocast(q.device.type, enabled=False):
        for r, s, first in chunks:
            args = (q[r], k[s], v[s], first, *(x[r] for x in per_query))
            args += () if blocks is None else (blocks[:, r],)
            outs.append(checkpoint(attend, *args, **recomputed) if recompute else attend(*args))
    o, lse = zip(*outs, strict=True)
    return torch.cat(o).to(dtype), torch.cat(lse)
