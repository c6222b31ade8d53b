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

A third one, `mixture`, computes the gated sum of the paper's three branches. Near the queries one product with the keys
and one with the values serve selection and window; before, the selection takes parts. It has no lse.
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

# Queries of `mixture` that share the keys near them, and keys before these that share a product.
NEAR = 128
FAR = 512

# Queries of a product with gathered rows. The number is fixed, since the rounding of a product depends on its shape:
# how many later queries choose a block changes nothing for earlier ones.
TILE = 16

# Logits are multiplied by this, and weights are powers of 2: exp2 is faster than exp and softmax.
LOG2_E = math.log2(math.e)

# Elements from which on PyTorch divides an operation among threads.
SHARE = 2**15

# The most that a part may add to a sum of weights before their shift follows: far from overflow, and seldom exceeded.
MAX_SUM = 2.0**64

# Share of all blocks so far that are chosen, below which gathering rows takes less time than all keys.
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

    rows: torch.Tensor | None  # int64 [m], of the chunk's c queries; c stands for none. None: all of them
    keys: slice
    bias: torch.Tensor | None = None  # bool [m, keys], False where hidden; or floating-point, added to the logits


def block_parts(chosen: torch.Tensor, index: torch.Tensor, block_size: int, start: int = 0) -> list[Part]:
    """A part for each block that a query of a chunk chose, of one KV head.

    Args:
        chosen: bool [c, blocks]; index: int64 [c], where the queries stand.
        start: Where the stream starts among the keys.
    """
    n = int(index[-1]) + 1
    index = pad(index, (0, 1), value=-1)
    parts = []
    for j, is_row in enumerate(chosen.T.contiguous()):
        rows = is_row.nonzero().squeeze(1)
        stop = min((j + 1) * block_size, n)
        if len(rows) == 0 or j * block_size >= n:
            continue

        first = int(index[rows[0]])
        rows = pad(rows, (0, -len(rows) % TILE), value=len(index) - 1)
        bias = None
        if stop > first + 1:
            # Keys of the block come after some of the queries.
            key = torch.arange(j * block_size, stop, device=index.device)
            bias = key <= index[rows, None]
        parts.append(Part(rows, slice(start + j * block_size, start + stop), bias))
    return parts


def visible_keys(chosen: torch.Tensor, index: torch.Tensor, block_size: int) -> torch.Tensor:
    """Chosen blocks bool [..., c, blocks] -> bool [..., c, keys up to the last query], False after each query."""
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


def is_cheaper_at_once(q: torch.Tensor) -> bool:
    """Whether `mixture` takes less time than each branch by itself: where fused attention is no faster."""
    return q.device.type == "cpu" and not has_amx(q.dtype)


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
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, chunks):
        o = torch.zeros_like(q)
        lse = q.new_full(q.shape[:2], -torch.inf)
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [G, n, D]

        for queries, heads, g, parts in chunks:
            out, total, shift = _sums(q[queries, heads] * (scale * LOG2_E), k[g], v[g], parts)
            o[queries, heads] = out.div_(total.masked_fill(total == 0, 1).unsqueeze(-1))
            lse[queries, heads] = shift + total.log2()

        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale, ctx.chunks = scale, chunks
        lse = lse / LOG2_E
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

        # autograd runs this under the autocast of the loss.
        with torch.autocast(q.device.type, enabled=False):
            for queries, heads, g, parts in ctx.chunks:
                x, grad = q[queries, heads] * (ctx.scale * LOG2_E), do[queries, heads]
                own = (grad * o[queries, heads]).sum(-1)
                dx = _sums_gradients(x, k[g], v[g], parts, lse[queries, heads], grad, own, dk[g], dv[g])
                dq[queries, heads] = dx.mul_(ctx.scale)
            dk.div_(LOG2_E)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1), None, None


def _sums(x, k, v, parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ 2^(y_j - shift) v_j [c, r, D], Σ 2^(y_j - shift) [c, r] and shift [c, r], over the keys j of all parts in which
    a query is a row, for y_j = x·k_j + bias_j / log 2; x [c, r, D] is scaled by `LOG2_E`, too.

    The shift of a row is the largest y_j of its first part. It rises where a part adds more than `MAX_SUM`.
    """
    x = _with_none(x)
    out = torch.zeros_like(x)
    total = x.new_zeros(x.shape[:2])
    shift = x.new_full(x.shape[:2], -torch.inf)

    for part in parts:
        rows = part.rows
        old = _take(shift, rows)
        rises = old == -torch.inf
        if part is not parts[0]:
            p = _weights(_logits(x, k, part), old)
            added = p.sum(-1)
            # Infinite where a row has no shift yet.
            rises = added > MAX_SUM
        if rises.any():
            p = _logits(x, k, part)
            new = p.amax(-1).where(rises, old)
            before = shift.clone()
            _put(shift, rows, new)
            # Of all queries: what a factor is rounded to depends on how many there are.
            factor = (before - shift).exp2_().nan_to_num_(1.0)
            total *= factor
            out *= factor.unsqueeze(-1)
            added = _weights(p, new).sum(-1)
        _add(total, rows, added)
        _add(out, rows, _times(p, v[part.keys], rows))
    return out[:-1], total[:-1], shift[:-1]


def _sums_gradients(x, k, v, parts: list[Part], shift, grad, own, dk, dv) -> torch.Tensor:
    """Returns dq / scale [c, r, D] and adds to dk, times `LOG2_E`, and to dv, for p_j = 2^(y_j - shift).

    Args:
        grad: [c, r, D], the gradient of Σ p_j v_j.
        own: [c, r], Σ p_j grad·v_j over all keys of the softmax, also those of no part.

    dv_j = Σ p_j grad, dy_j = p_j (grad·v_j - own), dq = scale Σ dy_j k_j, dk_j = scale Σ dy_j q.
    """
    x, grad, own, shift = (_with_none(y) for y in (x, grad, own, shift))
    dx = torch.zeros_like(x)
    for part in parts:
        rows, keys, _ = part
        p = _weights(_logits(x, k, part), _take(shift, rows))
        grad_rows = _take(grad, rows)
        dy = _less(_times(grad_rows, v[keys].T, rows), _take(own, rows)).mul_(p)
        _add(dx, rows, _times(dy, k[keys], rows))
        dk[keys].addmm_(dy.flatten(0, 1).T, _take(x, rows).flatten(0, 1))
        dv[keys].addmm_(p.flatten(0, 1).T, grad_rows.flatten(0, 1))
    return dx[:-1]


def _with_none(x) -> torch.Tensor:
    """[c, ...] -> [c + 1, ...], with zeros for a row that stands for none."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def _take(x, rows) -> torch.Tensor:
    """Some rows of x [c + 1, ...], or all but the last."""
    return x[:-1] if rows is None else x.index_select(0, rows)


def _put(x, rows, y) -> None:
    x[:-1].copy_(y) if rows is None else x.index_copy_(0, rows, y)


def _add(x, rows, y) -> None:
    x[:-1].add_(y) if rows is None else x.index_add_(0, rows, y)


def _logits(x, k, part: Part) -> torch.Tensor:
    """x [c + 1, r, D], scaled by `LOG2_E`, too, and k [n, D] -> [m, r, keys]"""
    logits = _times(_take(x, part.rows), k[part.keys].T, part.rows)
    if part.bias is None:
        return logits
    bias = part.bias.unsqueeze(1)
    return logits.masked_fill_(~bias, -torch.inf) if bias.dtype == torch.bool else logits.add_(bias, alpha=LOG2_E)


def _weights(logits, shift) -> torch.Tensor:
    """2^(logits - shift), in place, in steps that at most two threads share, whole vectors each. What is left over of a
    share would be rounded in another way, and which elements these are depends on how many rows there are."""
    for step in _less(logits, shift).view(-1).split(2 * SHARE):
        step.exp2_()
    return logits


def _less(logits, shift) -> torch.Tensor:
    """logits - shift, in place; shift has one dimension less, and is -inf if all logits of a row are."""
    return logits.sub_(shift.clamp(min=torch.finfo(shift.dtype).min).unsqueeze(-1))


def _times(x, y, rows=None) -> torch.Tensor:
    """x [m, r, a], y [a, b] -> [m, r, b]; in products of whole tiles if only some rows are given."""
    m, r, _ = x.shape
    if rows is None:
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
    first, groups = len(k) - len(q), k.shape[1]
    index = stream_index(q, first)
    block = torch.arange((len(k) - 1) // block_size + 1, device=q.device)
    # Fewer queries at a time if the window is very large.
    step = max(1, min(NEAR, MAX_SCORES * groups // (q.shape[1] * (window_size + NEAR))))
    # Keys near a query begin with the block where the window of the first of its `step` queries does.
    starts = (index - (index - first) % step - window_size + 1).clamp(min=0) // block_size * block_size  # [C]

    few = slices(len(q), step)
    gather = chosen is not None and is_cheaper_by_parts(chosen, index, block_size, q.dtype)
    every = slice(None)
    turns = [(every, [(rows, rows) for rows in few])] if gather else [(rows, [(rows, every)]) for rows in few]

    # No tensor that has a gradient in these: backward calls them, and autograd does not know.
    def see_far(g: int, rows: slice) -> list[Part]:
        """The selection's parts before the keys near these queries."""
        if gather:
            return block_parts(chosen[g] & (block * block_size < starts[:, None]), index, block_size)
        keys = slices(int(starts[rows.start]), max(FAR, block_size))
        if chosen is None:
            return [Part(None, x) for x in keys]
        visible = chosen[g, rows].repeat_interleave(block_size, -1)
        return [Part(None, x, visible[:, x]) for x in keys]

    def see_near(g: int, rows: slice) -> tuple:
        """The blocks whose means these queries see, and which each does; the keys near them, and which of these the
        selection and the window do: (slice, bool [c, blocks]), (slice, bool [c, keys], bool [c, keys])."""
        i = index[rows, None]
        n = int(i[-1]) + 1
        start = int(starts[rows.start])
        key = torch.arange(start, n, device=q.device)
        selected = key <= i
        last = selected & (key > i - window_size)
        if chosen is not None:
            selected = visible_keys(chosen[g, rows, start // block_size :], index[rows] - start, block_size)
        complete = block[: n // block_size] < (i + 1) // block_size
        return (slice(0, n // block_size), complete), (slice(start, n), selected, last)

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v, *means = (x.transpose(0, 1).contiguous() for x in (k, v, *means))
    return _Mixture.apply(q.to(k.dtype), k, v, *means, gates.to(k.dtype), scale, turns, see_far, see_near)


class _Mixture(torch.autograd.Function):
    """o = Σ_b gate_b p_b v_b, with p_b = softmax(scale q·k_bᵀ) where seen; branches: means, chosen, last keys.

    q [C, H, D], k and v [G, n, D], their means [G, blocks, D], gates [C, H, 3]. Turns are (queries that take far keys
    together, few of them at a time); the few are a slice of all queries, and of those of the turn. see_far(g, queries)
    and see_near(g, few) as in `mixture`.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_means, v_means, gates, scale, turns, see_far, see_near):
        o, tops, totals = torch.empty_like(q), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
        # What the selection sees far from the queries, which the gradient needs.
        far = torch.empty_like(q) if any(ctx.needs_input_grad) else None

        for g, heads, queries, few in _heads_and_turns(len(k), q.shape[1], turns):
            xs = q[queries, heads] * (scale * LOG2_E)
            sums = _sums(xs, k[g], v[g], see_far(g, queries))
            for rows, within in few:
                out, total, shift = (y[within] for y in sums)
                seen = see_near(g, rows)
                (blocks, _), (keys, _, _) = seen
                factors = gates[rows, heads].unsqueeze(-1).unbind(-2)  # 3 x [c, r, 1]
                compression, selection, window = _near_logits(xs[within], k[g], k_means[g], seen)

                top = torch.maximum(selection.amax(-1), shift)
                rest = (shift - top).exp2_()
                total = _weights(selection, top).sum(-1).addcmul_(total, rest)
                tops[rows, heads], totals[rows, heads] = top, total
                out *= (rest / total).unsqueeze(-1)
                if far is not None:
                    far[rows, heads] = out

                selection.mul_(factors[1] / total.unsqueeze(-1)).add_(_softmax(window, factors[2]))
                out = (out * factors[1]).add_(_times(selection, v[g, keys]))
                o[rows, heads] = out.add_(_times(_softmax(compression, factors[0]), v_means[g, blocks]))

        ctx.save_for_backward(q, k, v, k_means, v_means, gates, far, tops, totals)
        ctx.scale, ctx.turns, ctx.see_far, ctx.see_near = scale, turns, see_far, see_near
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        """With w_b = do·v_bᵀ: dgate_b = Σ p_b w_b, and the gradient of the logits is gate_b p_b (w_b - dgate_b)."""
        q, k, v, k_means, v_means, gates, far, tops, totals = ctx.saved_tensors
        dq, dgates = torch.empty_like(q), torch.empty_like(gates)
        dk, dv, dk_means, dv_means = (torch.zeros_like(x) for x in (k, v, k_means, v_means))

        # autograd runs this under the autocast of the loss.
        with torch.autocast(q.device.type, enabled=False):
            for g, heads, queries, few in _heads_and_turns(len(k), q.shape[1], ctx.turns):
                xs = q[queries, heads] * (ctx.scale * LOG2_E)
                for rows, within in few:
                    x, grad = xs[within], do[rows, heads]
                    seen = ctx.see_near(g, rows)
                    (blocks, _), (keys, _, _) = seen
                    compression, selection, window = _near_logits(x, k[g], k_means[g], seen)
                    _weights(selection, tops[rows, heads]).div_(totals[rows, heads].unsqueeze(-1))
                    p = _softmax(compression), selection, _softmax(window)

                    of_blocks, of_keys = _times(grad, v_means[g, blocks].T), _times(grad, v[g, keys].T)
                    w = of_blocks, of_keys, of_keys.clone()
                    dgate = torch.stack([(x * y).sum(-1) for x, y in zip(p, w, strict=True)], -1)
                    dgate[..., 1] += (grad * far[rows, heads]).sum(-1)
                    dgates[rows, heads] = dgate
                    for b, gate in enumerate(gates[rows, heads].unsqueeze(-1).unbind(-2)):
                        _less(w[b], dgate[..., b]).mul_(p[b].mul_(gate))
                    selection += window
                    of_keys += w[2]

                    dx = torch.zeros_like(x)
                    for weights, dy, part, x_k, dx_k, dx_v in (
                        (compression, of_blocks, blocks, k_means, dk_means, dv_means),
                        (selection, of_keys, keys, k, dk, dv),
                    ):
                        dx += _times(dy, x_k[g, part])
                        dx_k[g, part].addmm_(dy.flatten(0, 1).T, x.flatten(0, 1))
                        dx_v[g, part].addmm_(weights.flatten(0, 1).T, grad.flatten(0, 1))
                    dq[rows, heads] = dx

                # Weights relative to the largest logit: their log-sum-exp would round large ones.
                factor = gates[queries, heads, 1] / totals[queries, heads]
                grad, own = do[queries, heads] * factor.unsqueeze(-1), dgates[queries, heads, 1] * factor
                parts, top = ctx.see_far(g, queries), tops[queries, heads]
                dq[queries, heads] += _sums_gradients(xs, k[g], v[g], parts, top, grad, own, dk[g], dv[g])
            dq.mul_(ctx.scale)
            dk.div_(LOG2_E)
            dk_means.div_(LOG2_E)
        return dq, dk, dv, dk_means, dv_means, dgates, None, None, None, None


def _heads_and_turns(groups: int, heads: int, turns) -> Iterator[tuple]:
    """(KV head, its query heads, queries, few of them at a time) for each KV head and turn."""
    r = heads // groups
    for g in range(groups):
        for queries, few in turns:
            yield g, slice(g * r, (g + 1) * r), queries, few


def _near_logits(x, k, k_means, seen) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits of each branch [c, r, means or keys], near x [c, r, D]."""
    (blocks, complete), (keys, selected, last) = seen
    biases = [x.new_zeros(y.shape).masked_fill_(~y, -torch.inf).unsqueeze(1) for y in (complete, selected, last)]
    compression = _times(x, k_means[blocks].T).add_(biases[0])
    selection = _times(x, k[keys].T)
    window = selection + biases[2]
    return compression, selection.add_(biases[1]), window


def _softmax(logits, factor=1) -> torch.Tensor:
    """The softmax times a factor [c, r, 1], in place; 0 where no key is seen."""
    if logits.shape[-1] == 0:
        return logits
    # Where a key is seen, the largest weight is 1.
    total = _weights(logits, logits.amax(-1)).sum(-1, keepdim=True).clamp_(min=1)
    return logits.mul_(factor / total)


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
