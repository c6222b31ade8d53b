"""Softmax attention over chosen keys in plain PyTorch: how `nsa_torch.py` and `nsa_merged.py` compute their sums.

Packed samples are cut into *pieces* (`by_pieces`): adjacent queries of one sample, and its keys up to the last of them.
In what follows, q is [C, H, D] of any dtype, the last C of the n tokens of k and v [n, G, D], which are fp32 or fp64.
Results are o [C, H, D] and lse [C, H] in the dtype of k; lse is the natural log-sum-exp of a query's logits.

There are two ways to compute a softmax over some of the keys:

- `softmax_over` takes *parts* (some keys, and the queries that see them), and multiplies only these. It has exact
  gradients and lse.
- PyTorch's fused attention takes all keys up to the query (`causal`), the means of all blocks so far (`staircase`), a
  band of keys (`bands`), or any with a mask (`masked`). It multiplies more, but each product takes less time. It has no
  lse.

A third one, `mixture`, computes the gated sum of the paper's three branches. One product with all keys up to the query
and one with all values serve them all. It has no lse.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

# Queries of a piece, at most.
PIECE = 1024

# Attention scores that are held at a time: 16 MB in fp32. On a CPU fewer, so that they stay in the cache of a core.
MAX_SCORES = 2**22
MAX_SCORES_CPU = 2**18

# Queries that share the keys of a window.
RUN = 32

# Queries that share a mask.
MASKED = 256

# Attention scores of a KV head that `mixture` holds at a time, if that is not too few queries for a product.
MIXED = 2**19
FEWEST = 32

# Queries of a product with gathered rows. The number is fixed, since the rounding of a product depends on its shape:
# how many later queries choose a block changes nothing for earlier ones.
TILE = 16

# Logits are multiplied by this, and weights are powers of 2: exp2 is faster than exp and softmax.
LOG2_E = math.log2(math.e)

# Elements from which on PyTorch divides an operation among threads.
SHARE = 2**15

# By how much a logit may exceed the shift of its softmax before sums are scaled again: 2^30 is far from overflow.
SLACK = 30

# Share of the keys before the queries that are chosen, below which gathering rows takes less time than all keys.
GATHER_BELOW = 0.7
# The same for 16-bit floats where AMX multiplies them: fused attention has it, gathering does not.
GATHER_BELOW_AMX = 0.35


def accumulate(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that softmax and sums are computed in: fp64 or fp32."""
    return x if x.dtype == torch.float64 else x.float()


# A compiler would make a graph for each piece. One that inductor of torch 2.14.1 made gave wrong sums.
@torch.compiler.disable
def by_pieces(
    attend: Callable,
    nothing: tuple,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    *per_query: torch.Tensor,
    cut: int = 0,
) -> tuple[torch.Tensor, ...]:
    """The results of attend(q, k, v, *per_query) for each piece, joined: a tuple of [N, ...].

    Args:
        nothing: The results if there are no queries.
        per_query: Tensors [N, ...], cut as q is.
        cut: A stream index that no piece crosses.

    The first result gets the dtype of q. Gradients of k and v are summed in fp32 or fp64.
    """
    dtype = q.dtype
    k, v = accumulate(k), accumulate(v)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k

    lengths = cu_seqlens_k.diff().tolist()
    sizes, keys = [], []
    # The gradient of a slice is as large as what it was cut from: samples are split before.
    samples = zip(cu_seqlens.diff().tolist(), lengths, k.split(lengths), v.split(lengths), strict=True)
    for count, length, sample_k, sample_v in samples:
        i = length - count
        while i < length:
            end = min(length, (i // PIECE + 1) * PIECE)
            if i < cut:
                end = min(end, cut)
            sizes.append(end - i)
            keys.append((sample_k[:end], sample_v[:end]))
            i = end
    if not sizes:
        return nothing

    def results():
        with torch.autocast(q.device.type, enabled=False):
            for seen, *queries in zip(keys, *(x.split(sizes) for x in (q, *per_query)), strict=True):
                o, *rest = attend(queries[0], *seen, *queries[1:])
                yield (o.to(dtype) if o.is_floating_point() else o, *rest)

    return _join(results(), len(q))


def _join(pieces: Iterable[tuple], n: int) -> tuple[torch.Tensor, ...]:
    """The results of pieces, which have n queries; without gradients as they come, so that none is held twice."""
    if torch.is_grad_enabled():
        return tuple(torch.cat(x) for x in zip(*pieces, strict=True))

    joined, stop = (), 0
    for piece in pieces:
        joined = joined or tuple(x.new_empty(n, *x.shape[1:]) for x in piece)
        start, stop = stop, stop + len(piece[0])
        for whole, x in zip(joined, piece, strict=True):
            whole[start:stop] = x
    return joined


def nothing_of(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse of no queries."""
    return q[:0], accumulate(q.detach()).new_empty(0, q.shape[1])


def slices(n: int, step: int) -> list[slice]:
    """0 ... n - 1 in slices of at most `step`."""
    step = max(1, step)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def chunks(q: torch.Tensor, scores: float) -> list[slice]:
    """The queries in slices that hold no more than `MAX_SCORES` scores, if a query has so many."""
    most = MAX_SCORES_CPU if q.device.type == "cpu" else MAX_SCORES
    return slices(len(q), int(most // max(1, scores)))


def stream_index(q: torch.Tensor, first: int) -> torch.Tensor:
    """int64 [C]: where queries stand in their stream, from `first` on."""
    return torch.arange(first, first + len(q), device=q.device)


# ----------------------------------------------------------------------------------------------------------------------
# Softmax over parts
# ----------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Some queries of a chunk, and the keys that they see, except where `bias` hides one."""

    rows: torch.Tensor  # int64 [m], of the chunk's c queries; c stands for none
    keys: slice
    bias: torch.Tensor | None  # bool [m, keys], False where hidden; or floating-point, added to the logits


def every_row(q: torch.Tensor, rows: slice) -> torch.Tensor:
    """The `rows` of a part that all queries of a chunk see."""
    return torch.arange(rows.stop - rows.start, device=q.device)


def block_parts(chosen: torch.Tensor, index: torch.Tensor, block_size: int, start: int = 0) -> list[Part]:
    """A part for each block that a query of a chunk chose, of one KV head.

    Args:
        chosen: bool [c, blocks]; index: int64 [c], where the queries stand.
        start: Where the stream starts among the keys.
    """
    first = int(index[0])
    n = int(index[-1]) + 1
    index = pad(index, (0, 1), value=-1)
    parts = []
    for j, is_row in enumerate(chosen.T.contiguous()):
        rows = is_row.nonzero().squeeze(1)
        stop = min((j + 1) * block_size, n)
        if len(rows) == 0 or j * block_size >= n:
            continue

        rows = pad(rows, (0, -len(rows) % TILE), value=len(index) - 1)
        bias = None
        if stop > first + 1:
            # Keys of the block come after some of the queries.
            key = torch.arange(j * block_size, stop, device=index.device)
            bias = key <= index[rows, None]
        parts.append(Part(rows, slice(start + j * block_size, start + stop), bias))
    return parts


def visible_keys(chosen: torch.Tensor, index: torch.Tensor, block_size: int) -> torch.Tensor:
    """Chosen blocks bool [G, c, blocks] -> bool [G, c, keys up to the last query], False after each query."""
    key = torch.arange(int(index[-1]) + 1, device=chosen.device)
    return chosen.repeat_interleave(block_size, -1)[..., : len(key)] & (key <= index[:, None])


def is_cheaper_by_parts(chosen: torch.Tensor, index: torch.Tensor, block_size: int, dtype: torch.dtype) -> bool:
    """Whether `block_parts` take less time than all keys, for chosen blocks bool [G, C, blocks]."""
    if chosen.device.type != "cpu":
        # A GPU would wait for itself at every block.
        return False
    share = chosen.sum() / (len(chosen) * (index // block_size + 1).sum())
    return bool(share < (GATHER_BELOW_AMX if has_amx(dtype) else GATHER_BELOW))


def has_amx(dtype: torch.dtype) -> bool:
    """Whether the CPU has AMX for products of this dtype."""
    name = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    return torch.cpu.get_capabilities().get(name, False)


def is_cheaper_at_once(q: torch.Tensor, chosen: torch.Tensor | None, keys: int, block_size: int) -> bool:
    """Whether `mixture` takes less time than each branch by itself, for chosen blocks bool [G, C, blocks], or all."""
    if q.device.type != "cpu" or has_amx(q.dtype):
        # Fused attention is faster.
        return False
    return chosen is None or not is_cheaper_by_parts(chosen, stream_index(q, keys - len(q)), block_size, q.dtype)


def softmax_over(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    parts: Callable[[slice, int], list[Part]],
    keys: float = 0,
    step: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys of all parts in which a query is a row: o and lse; 0 and -inf if there is none.

    Args:
        parts: Called with a chunk, a slice of the queries, and a KV head.
        keys: How many keys of a part a query sees on average, from which the size of chunks follows.
        step: The size of chunks, if not by `keys`.
    """
    heads, groups = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    found = []
    for rows in slices(len(q), step) if step else chunks(q, keys * heads // groups):
        for g in range(groups):
            own = [part for part in parts(rows, g) if part.keys.start < part.keys.stop]
            if own:
                found.append((rows, slice(g * (heads // groups), (g + 1) * (heads // groups)), g, own))
    return _Attention.apply(accumulate(q), k, v, scale, found)


class _Attention(torch.autograd.Function):
    """o = Σ p_j v_j and lse = log Σ exp(x_j), with x_j = scale q·k_j + bias_j and p_j = exp(x_j - lse), over the keys j
    of all parts in which a query is a row. Chunks are (queries, their heads, KV head, parts).

    With y_j = x_j / log 2, part by part, out = Σ 2^(y_j - shift) v_j and total = Σ 2^(y_j - shift); shift follows the
    largest y_j so far.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, chunks):
        o = torch.zeros_like(q)
        lse = q.new_full(q.shape[:2], -torch.inf)
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [G, n, D]

        for queries, heads, g, parts in chunks:
            x = _with_none(q[queries, heads] * (scale * LOG2_E))  # [c + 1, r, D]
            out = torch.zeros_like(x)
            total = x.new_zeros(x.shape[:2])
            shift = x.new_full(x.shape[:2], -torch.inf)

            for part in parts:
                rows = part.rows
                p = _logits(x, k[g], part)
                top = p.amax(-1)  # [m, r]
                old = shift.index_select(0, rows)
                rises = top > old + SLACK
                if rises.any():
                    new = torch.where(rises, top, old)
                    factor = (old - new).exp2_().nan_to_num_(1.0)
                    shift.index_copy_(0, rows, new)
                    total.index_copy_(0, rows, total.index_select(0, rows) * factor)
                    out.index_copy_(0, rows, out.index_select(0, rows) * factor.unsqueeze(-1))
                    old = new

                _exp2_(_less(p, old))
                total.index_add_(0, rows, p.sum(-1))
                out.index_add_(0, rows, _rows_times(p, v[g, part.keys]))

            o[queries, heads] = out.div_(total.masked_fill(total == 0, 1).unsqueeze(-1))[:-1]
            lse[queries, heads] = (shift + total.log2()).div_(LOG2_E)[:-1]

        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.chunks = scale, chunks
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        """dv_j = Σ p_j do, dx_j = p_j (do·v_j - do·o), dq = scale Σ dx_j k_j, dk_j = scale Σ dx_j q."""
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

        # autograd runs this under the autocast of the loss.
        with torch.autocast(q.device.type, enabled=False):
            for queries, heads, g, parts in ctx.chunks:
                x = _with_none(q[queries, heads] * (ctx.scale * LOG2_E))
                grad = _with_none(do[queries, heads])
                own = (grad * _with_none(o[queries, heads])).sum(-1, keepdim=True)
                shift = _with_none(lse[queries, heads].unsqueeze(-1)).squeeze(-1) * LOG2_E

                out = torch.zeros_like(x)
                for part in parts:
                    rows, keys, _ = part
                    p = _exp2_(_less(_logits(x, k[g], part), shift.index_select(0, rows)))
                    grad_rows = grad.index_select(0, rows)
                    dx = _rows_times(grad_rows, v[g, keys].T).sub_(own.index_select(0, rows)).mul_(p)
                    out.index_add_(0, rows, _rows_times(dx, k[g, keys]))
                    dk[g, keys].addmm_(dx.flatten(0, 1).T, x.index_select(0, rows).flatten(0, 1))
                    dv[g, keys].addmm_(p.flatten(0, 1).T, grad_rows.flatten(0, 1))
                dq[queries, heads] = out[:-1].mul_(ctx.scale)
            dk.div_(LOG2_E)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None


def _with_none(x) -> torch.Tensor:
    """[c, r, D] -> [c + 1, r, D], with zeros for a row that stands for none."""
    return pad(x, (0, 0, 0, 0, 0, 1))


def _logits(x, k, part: Part) -> torch.Tensor:
    """x [c + 1, r, D], scaled by `LOG2_E`, too, and k [n, D] -> [m, r, keys]"""
    logits = _rows_times(x.index_select(0, part.rows), k[part.keys].T)
    if part.bias is None:
        return logits
    bias = part.bias.unsqueeze(1)
    return logits.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else logits.add_(bias, alpha=LOG2_E)


def _less(logits, shift) -> torch.Tensor:
    """logits - shift, in place; shift has one dimension less, and is -inf if all logits of a row are."""
    return logits.sub_(shift.clamp(min=torch.finfo(shift.dtype).min).unsqueeze(-1))


def _exp2_(x) -> torch.Tensor:
    """2^x in place, in steps that at most two threads share, whole vectors each. What is left over of a share would be
    rounded in another way, and which elements these are depends on how many rows there are."""
    for step in x.view(-1).split(2 * SHARE):
        step.exp2_()
    return x


def _rows_times(x, y) -> torch.Tensor:
    """x [m, r, a], y [a, b] -> [m, r, b]; in products of whole tiles, if m is a multiple of them."""
    m, r, _ = x.shape
    if m % TILE:
        return (x.flatten(0, 1) @ y).unflatten(0, (m, r))
    return torch.bmm(x.view(m // TILE, TILE * r, -1), y.expand(m // TILE, -1, -1)).view(m, r, -1)


# ----------------------------------------------------------------------------------------------------------------------
# The branches of the paper at once
# ----------------------------------------------------------------------------------------------------------------------


def mixture(q, k, v, means, gates, chosen, block_size: int, window_size: int, scale: float | None) -> torch.Tensor:
    """The gated sum of the three branches, o [C, H, D].

    Args:
        means: Those of complete blocks of keys and of values, each [blocks, G, D].
        gates: [C, H, 3].
        chosen: Blocks of the selection, bool [G, C, blocks], or None for all.
    """
    groups, dtype = k.shape[1], k.dtype
    index = stream_index(q, len(k) - len(q))
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    # No tensor that has a gradient: backward calls this, and autograd does not know.
    def see(g: int, rows: slice) -> list[tuple[slice, torch.Tensor]]:
        """For each branch the slice that these queries see, and a bias of all or the last of it, -inf where hidden."""
        i = index[rows, None]
        n = int(i[-1]) + 1
        start = max(0, int(i[0]) - window_size + 1)
        key = torch.arange(n, device=index.device)
        block = key[: n // block_size]
        seen = key <= i
        near = (seen & (key > i - window_size))[:, start:]
        if chosen is None:
            seen = seen[:, int(i[0]) + 1 :]
        else:
            seen = seen & chosen[g, rows].repeat_interleave(block_size, -1)[:, :n]
        masks = block < (i + 1) // block_size, seen, near
        biases = [torch.zeros(x.shape, dtype=dtype, device=x.device).masked_fill_(~x, -torch.inf) for x in masks]
        return list(zip((slice(0, len(block)), slice(0, n), slice(start, n)), biases, strict=True))

    q, gates = (x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).to(dtype).contiguous() for x in (q, gates))
    k, v, *means = (x.transpose(0, 1).contiguous() for x in (k, v, *means))
    o = _Mixture.apply(q, k, v, *means, gates, scale, see)
    return o.permute(2, 0, 1, 3).flatten(1, 2)


class _Mixture(torch.autograd.Function):
    """o = Σ_b gate_b p_b v_b, with p_b = softmax(scale q·k_bᵀ + bias_b); branches are block means, keys, the last keys.

    q [G, r, C, D], k and v [G, n, D], their means [G, blocks, D], gates [G, r, C, 3]; see(g, rows) as in `mixture`.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_means, v_means, gates, scale, see):
        o = torch.empty_like(q)
        for g, rows, x, room in _few_queries(q, k, scale):
            (blocks, _), (keys, _), (last, _) = seen = see(g, rows)
            factors = gates[g, :, rows].unbind(-1)
            compression, selection, window = _branch_weights(x, k[g], k_means[g], seen, factors, room[0])

            # The last keys are among all keys.
            selection[..., last].add_(window)
            out = selection.flatten(0, 1) @ v[g, keys]
            out.addmm_(compression.flatten(0, 1), v_means[g, blocks])
            o[g, :, rows] = out.view_as(x)

        ctx.save_for_backward(q, k, v, k_means, v_means, gates)
        ctx.scale, ctx.see = scale, see
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        """With w_b = do·v_bᵀ: dgate_b = Σ p_b w_b, and the gradient of the logits is gate_b p_b (w_b - dgate_b)."""
        q, k, v, k_means, v_means, gates = ctx.saved_tensors
        dq, dgates = torch.empty_like(q), torch.empty_like(gates)
        dk, dv, dk_means, dv_means = (torch.zeros_like(x) for x in (k, v, k_means, v_means))

        # autograd runs this under the autocast of the loss.
        with torch.autocast(q.device.type, enabled=False):
            for g, rows, x, room in _few_queries(q, k, ctx.scale):
                (blocks, _), (keys, _), (last, _) = seen = ctx.see(g, rows)
                p = compression, selection, window = _branch_weights(x, k[g], k_means[g], seen, (1, 1, 1), room[0])
                x, grad = x.flatten(0, 1), do[g, :, rows].flatten(0, 1)

                of_keys = torch.mm(grad, v[g, keys].T, out=_first(room[1], len(x), keys.stop)).view_as(selection)
                of_blocks = (grad @ v_means[g, blocks].T).view_as(compression)
                w = of_blocks, of_keys, of_keys[..., last].clone()
                for b in range(len(p)):
                    gate = gates[g, :, rows, b, None]
                    total = (p[b] * w[b]).sum(-1, keepdim=True)
                    dgates[g, :, rows, b] = total.squeeze(-1)
                    w[b].sub_(total).mul_(p[b].mul_(gate))
                selection[..., last] += window
                of_keys[..., last] += w[2]

                out = torch.zeros_like(x)
                for weights, dx, part, x_k, dx_k, dx_v in (
                    (compression, of_blocks, blocks, k_means, dk_means, dv_means),
                    (selection, of_keys, keys, k, dk, dv),
                ):
                    dx = dx.flatten(0, 1)
                    out.addmm_(dx, x_k[g, part])
                    dx_k[g, part].addmm_(dx.T, x)
                    dx_v[g, part].addmm_(weights.flatten(0, 1).T, grad)
                dq[g, :, rows] = out.mul_(ctx.scale).unflatten(0, selection.shape[:2])
            dk.div_(LOG2_E)
            dk_means.div_(LOG2_E)
        return dq, dk, dv, dk_means, dv_means, dgates, None, None


def _few_queries(q, k, scale: float) -> Iterator[tuple]:
    """KV head, slice of its queries, these scaled [r, c, D] (by `LOG2_E`, too), and room for two tensors of scores."""
    groups, r, count, _ = q.shape
    n = k.shape[1]
    step = min(count, max(FEWEST, MIXED // (r * n)))
    # Memory that is reused: new memory costs as much as a tenth of the products.
    room = k.new_empty(2, r * step * n)
    for g in range(groups):
        for rows in slices(count, step):
            yield g, rows, q[g, :, rows] * (scale * LOG2_E), room


def _first(room, rows: int, keys: int) -> torch.Tensor:
    """The first scores of a room, [rows, keys]."""
    return room[: rows * keys].view(rows, keys)


def _branch_weights(x, k, k_means, seen, factors, room) -> tuple[torch.Tensor, ...]:
    """The softmax of each branch times its factor, [r, c, means or keys]; that of all keys lies in the room."""
    (blocks, blocks_bias), (keys, keys_bias), (last, last_bias) = seen
    rows = x.flatten(0, 1)
    selection = torch.mm(rows, k[keys].T, out=_first(room, len(rows), keys.stop)).unflatten(0, x.shape[:2])
    window = selection[..., last] + last_bias
    selection[..., keys.stop - keys_bias.shape[-1] :] += keys_bias
    compression = (rows @ k_means[blocks].T).unflatten(0, x.shape[:2]).add_(blocks_bias)

    branches = compression, selection, window
    for weights, factor in zip(branches, factors, strict=True):
        # The first queries see no complete block. Elsewhere the largest weight is 1.
        if weights.numel() > 0:
            total = _less(weights, weights.amax(-1)).exp2_().sum(-1).clamp_(min=1)
            weights.mul_((factor / total).unsqueeze(-1))
    return branches


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's fused attention
# ----------------------------------------------------------------------------------------------------------------------


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """o of attention over all keys up to the query."""
    if len(q) == len(k):
        return _fused(q, k, v, scale, is_causal=True)
    return staircase(q, k, v, scale, len(k) - len(q), 1)


def staircase(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, first: int, step: int):
    """o of attention of the query at stream index i, counted from `first` on, over the first (i + 1) // step keys; 0
    if there are none."""
    none = min(max(step - 1 - first, 0), len(q))
    counts = (stream_index(q, first)[none:, None] + 1) // step
    key = torch.arange(len(k), device=q.device)
    o = masked(q[none:], k, v, lambda rows: (key[: counts[rows][-1]] < counts[rows])[None], scale)
    return pad(o, (0, 0, 0, 0, none, 0))


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Callable, scale: float | None) -> torch.Tensor:
    """o of attention where visible(rows) gives the mask of a few queries: bool [G or 1, c, keys up to the last]."""
    outs = [accumulate(q[:0])]
    for rows in slices(len(q), MASKED):
        mask = visible(rows)
        m = mask.shape[-1]
        outs.append(_fused(q[rows], k[:m], v[:m], scale, attn_mask=mask.unsqueeze(1)))
    return torch.cat(outs)


def bands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_size: int, scale: float | None) -> torch.Tensor:
    """o of attention over the last `window_size` keys up to the query."""
    first = len(k) - len(q)
    # First the queries whose window holds all keys before them, then whole runs, then what is left.
    dense = min(max(window_size - first, 0), len(q))
    rest = (len(q) - dense) % RUN

    outs = []
    if dense > 0:
        outs.append(causal(q[:dense], k[: first + dense], v[: first + dense], scale))
    for start, stop, run in ((dense, len(q) - rest, RUN), (len(q) - rest, len(q), rest)):
        if start < stop:
            keys = slice(first + start - window_size + 1, first + stop)
            outs.append(_whole_bands(q[start:stop], k[keys], v[keys], run, scale))
    return torch.cat(outs)


def _whole_bands(q, k, v, run: int, scale: float | None) -> torch.Tensor:
    """As `bands`, of queries with a whole window, whose number is a multiple of `run`; k and v begin with the first
    window."""
    window_size = len(k) - len(q) + 1
    groups, dim = k.shape[1:]
    q = q.view(-1, run, groups, q.shape[1] // groups, dim).permute(0, 2, 3, 1, 4)  # [runs, G, r, run, D]
    # Overlapping views, without a copy: [runs, G, keys, D].
    k, v = (x.to(q.dtype).unfold(0, run + window_size - 1, run).transpose(2, 3) for x in (k, v))

    i = torch.arange(run, device=q.device)[:, None]
    j = torch.arange(run + window_size - 1, device=q.device)
    visible = ((j >= i) & (j < i + window_size)).repeat(q.shape[2], 1)
    bias = q.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)  # [r * run, keys]

    o = scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=bias, scale=scale)
    o = o.unflatten(2, (-1, run)).permute(0, 3, 1, 2, 4)  # [runs, run, G, r, D]
    return accumulate(o.flatten(2, 3).flatten(0, 1))


def _fused(q, k, v, scale: float | None, **mask) -> torch.Tensor:
    """PyTorch's attention. KV heads are its batch, so that none is copied for its query heads."""
    q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [G, r, C, D]
    k, v = (x.to(q.dtype).transpose(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    o = scaled_dot_product_attention(q, k, v, scale=scale, **mask)
    return accumulate(o.permute(2, 0, 1, 3).flatten(1, 2))
