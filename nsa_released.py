"""The attention that the public VideoNSA checkpoint was trained with: `nsa_variant="released"`.

The public training code differs from the published method; `docs/released.md` says how, point by point, and where to
see it. This file puts those differences around the branches of `nsa_torch.py` or `nsa_triton.py`, one sample at a time.
A *stream* is here all tokens of a sample, text and vision; queries, keys and values of text count as 0 in it.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag, pad

from .nsa_checks import check_arguments
from .nsa_softmax import accumulate, bands, by_pieces
from .nsa_torch import choose, see_chosen, see_means
from .nsa_triton import pooled_attention as pooled_attention_triton
from .nsa_triton import select_blocks, selected_attention, window_attention

# The public kernels need a multiple of this number of query heads per KV head.
PADDED = 16


@dataclass
class Stream:
    """Where vision and text stand in the stream of one sample; made once per call, read by every layer."""

    vision: torch.Tensor  # bool [L]; the last n tokens are the queries
    vision_rows: torch.Tensor  # int64 [Nv], vision queries among the n
    text_rows: torch.Tensor  # int64 [T], text queries among the n
    ties: torch.Tensor  # int64 [T, 3, block_count]: what a text query selects, see `tied_choice`
    runs: list[tuple[int, int]]  # first and last + 1 of runs of queries that hold all vision queries
    all_vision: bool  # no text in the stream

    @classmethod
    def make(cls, vision: torch.Tensor, n: int, block_size: int, block_count: int) -> "Stream":
        """From vision bool [L], of whose tokens the last n are queries."""
        first = len(vision) - n
        rows, text = vision[first:].nonzero().squeeze(1), (~vision[first:]).nonzero().squeeze(1)
        starts = rows.diff(prepend=rows[:1] - 2 * block_size) > block_size  # text between joins them, if it is short
        edges = rows[starts].tolist()
        ends = rows[starts.roll(-1)].tolist() if edges else []
        return cls(
            vision=vision,
            vision_rows=rows,
            text_rows=text,
            ties=tied_choice((first + text) // block_size, block_size, block_count),
            runs=[(start, end + 1) for start, end in zip(edges, ends, strict=True)],
            all_vision=bool(vision.all()),
        )


def released_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    stream: Stream,
    *,
    triton: bool = False,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int = 256,
    block_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """The sparse term of every query, and the dense term of vision queries, of one sample with a vision query.

    What is left is the dense term of text queries, to be added: causal attention over all tokens. A stream without text
    has no dense term.

    Args:
        q: [n, H, D], after the rotary embedding, of the last n tokens of the stream; bf16, fp16 or fp32.
        k, v: [L, G, D], of all its tokens so far, not zeroed; same dtype.
        gates: [Nv, H, 3] of the vision queries, after the sigmoid, in the order compression, selection, window.
        triton: use the kernels of `nsa_triton`, not `nsa_torch`.
        block_causal: pooled blocks are seen up to the query's own, instead of from it on.

    Returns:
        [n, H, D] in the dtype of q; differentiable in q, k, v and gates.
    """
    attend_pooled, chosen_and_near = TRITON if triton else TORCH
    n, heads, dim = q.shape
    length, groups, _ = k.shape
    first = length - n
    scale = dim**-0.5 if scale is None else scale

    zeroed = ~stream.vision[:, None, None]
    all_v = v
    q, k, v = q.masked_fill(zeroed[first:], 0), k.masked_fill(zeroed, 0), v.masked_fill(zeroed, 0)
    k_means, v_means = _means(k, block_size), _means(v, block_size)
    # KV head g is read by the heads 16 g ... 16 g + 15 of these. `VideoNSATextConfig` checks that they fit.
    q = torch.cat([q, q, q.new_zeros(n, PADDED * groups - 2 * heads, dim)], 1)
    # Those of heads and copies, halved.
    gates = gates.new_zeros(n, *gates.shape[1:]).index_copy(0, stream.vision_rows, 0.5 * gates)
    gates = gates.to(q.dtype).unsqueeze(-1).unbind(2)  # 3 x [n, H, 1]

    compressed, lse = _compressed_runs(
        attend_pooled, q, k_means, v_means, stream, heads, first, block_size, block_causal, scale
    )
    lse = lse.view(n, PADDED * groups)  # the public code reads [heads, n] so
    others = (-lse).exp().unflatten(1, (groups, PADDED)).sum(2).T  # [groups, n]: importance of a block to a query of 0
    own_importance = others.new_full(others.shape, PADDED)

    out = q.new_zeros(n, heads, dim)
    rounded = (q * scale).detach()
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    for (start, stop), o in zip(stream.runs, compressed, strict=True):
        run, keys = slice(start, stop), slice(0, first + stop)
        choosing = (rounded[run], lse[run], own_importance[:, run])
        selected, window = chosen_and_near(q[run], k[keys], v[keys], choosing, **sizes)

        g_cmp, g_slc, g_win = (gate[run] for gate in gates)
        o = torch.addcmul(g_cmp * o, g_slc, _with_copies(selected, heads))
        out[run] = torch.addcmul(o, g_win, _with_copies(window, heads))
    if stream.all_vision:
        return out

    rows, positions = stream.text_rows, torch.arange(1, length + 1, device=q.device)[:, None, None]
    dense = accumulate(all_v).cumsum(0) / positions  # a vision query is 0 in the dense term
    out = (out.unflatten(1, (groups, -1)) + dense[first:].unsqueeze(2)).flatten(1, 2).to(q.dtype)
    if len(rows) == 0:
        return out
    sizes = {"block_size": block_size, "window_size": window_size, "block_causal": block_causal}
    means = _text_means(v, v_means, first + rows, stream.ties, others[:, rows].sub(PADDED).sign().long(), **sizes)
    copies = torch.arange(2 * heads, device=q.device).view(2, heads) // PADDED  # KV heads of each head and its copy
    return out.index_copy(0, rows, 0.25 * means[:, copies].sum(1).to(q.dtype))


def _compressed_runs(attend_pooled, q, k_means, v_means, stream, heads, first, block_size, block_causal, scale):
    """The compression branch of every run: a list of [run, H, D], and lse [padded heads, n] of all queries."""
    n, padded, _ = q.shape
    length, count = first + n, len(k_means)

    # A query that is 0 sees all its keys alike. So do the heads of zeros, whose lse is exactly this.
    own = torch.arange(first, length, device=q.device) // block_size
    seen = own + 1 if block_causal else count - own
    lse = seen.to(accumulate(q[:0]).dtype).log().repeat(padded, 1)

    compressed = []
    for start, stop in stream.runs:
        last = first + stop
        if block_causal:
            means, at = slice(0, -(-last // block_size)), first + start
        else:
            means, at = slice((first + start) // block_size, None), count * block_size - last

        o, run_lse = attend_pooled(
            q[start:stop],
            k_means[means],
            v_means[means],
            first=at + block_size - 1,
            block_size=block_size,
            reverse=not block_causal,
            scale=scale,
        )
        compressed.append(_with_copies(o, heads))
        own_lse = run_lse[:, : 2 * heads].T
        vision = stream.vision[first:][start:stop]
        lse[: 2 * heads, start:stop] = own_lse.where(vision, lse[: 2 * heads, start:stop])
    return compressed, lse


def _chosen_and_near_torch(q, k, v, choosing, *, block_size, block_count, window_size, scale):
    """The selection and window branches of one run; `choosing` has q, scaled, lse and the own blocks' importance."""
    sizes = {"block_size": block_size, "block_count": block_count}

    def attend(q, k, v, scored, lse, own_importance):
        exact, chosen = accumulate(q), None
        if len(k) > block_count * block_size:
            chosen = choose(scored, k, lse, own_importance, scale=1.0, **sizes)
        selected = see_chosen(exact, k, v, chosen, block_size, scale)
        return selected, bands(exact, k, v, window_size, scale).to(q.dtype)

    scored, lse, own_importance = choosing
    per_query = (scored, lse, own_importance.T)
    return by_pieces(attend, (), q, k, v, *_ends(q, k), *per_query, cut=block_count * block_size)


def _chosen_and_near_triton(q, k, v, choosing, *, block_size, block_count, window_size, scale):
    """The same by the kernels."""
    scored, lse, own_importance = choosing
    cu_seqlens, cu_seqlens_k = _ends(q, k)
    lengths = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    choice = {"block_size": block_size, "block_count": block_count, "own_importance": own_importance, "scale": 1.0}
    blocks = select_blocks(scored, k, lse, **choice, **lengths)
    selected, _ = selected_attention(q, k, v, blocks, block_size=block_size, scale=scale, **lengths)
    window, _ = window_attention(q, k, v, window_size=window_size, scale=scale, **lengths)
    return selected, window


def _ends(q, k) -> tuple[torch.Tensor, torch.Tensor]:
    """`cu_seqlens` and `cu_seqlens_k` of one sample of all queries and keys."""
    ends = torch.arange(2, dtype=torch.int32, device=q.device)
    return ends * len(q), ends * len(k)


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
    """The compression branch of one sample over means that are given.

    Args:
        q: [N, H, D]; k, v: [(first + N) // block_size, G, D], as many as the last query sees: query i sees the first
            (first + i + 1) // block_size of them.
        first: stream index of the first query, at least 0.
        reverse: count queries and keys from their ends, so that a query sees its own and later blocks.

    Returns and raises as `compressed_attention`.
    """
    check_arguments(q, k, v, None, first=first, block_size=block_size, scale=scale)
    dtype = q.dtype
    q, k, v = accumulate(q), accumulate(k), accumulate(v)
    if reverse:
        q, k, v = q.flip(0), k.flip(0), v.flip(0)
    with torch.autocast(q.device.type, enabled=False):
        o, lse = see_means(q, k, v, first, block_size, scale)
    return (o.flip(0).to(dtype), lse.flip(0)) if reverse else (o.to(dtype), lse)


TORCH = (pooled_attention, _chosen_and_near_torch)
TRITON = (pooled_attention_triton, _chosen_and_near_triton)


def _text_means(v, v_means, at, ties, rank, *, block_size, window_size, block_causal) -> torch.Tensor:
    """What the branches give to text queries at the positions `at` [T], summed: [T, G, D]. Each is a mean of values,
    as their logits are 0; `rank` [G, T] is the importance of other blocks minus that of the own, its sign.
    """
    (length, groups, _), own = v.shape, at // block_size
    sums = pad(v.double().cumsum(0), (0, 0, 0, 0, 1, 0))  # [L + 1, G, D]: differences must not cancel

    if block_causal:
        compressed = v_means.double().cumsum(0)[own] / (own + 1)[:, None, None]
    else:
        compressed = v_means.double().flip(0).cumsum(0).flip(0)[own] / (len(v_means) - own)[:, None, None]

    low = (at + 1 - window_size).clamp_min(0)
    window = (sums[at + 1] - sums[low]) / (at + 1 - low)[:, None, None]

    edges = torch.arange(len(v_means) + 1, device=v.device).mul(block_size).clamp_max(length)
    blocks = pad(sums[edges].diff(dim=0), (0, 0, 0, 0, 0, 1))  # [blocks + 1, G, D], the last for none
    none, selected = len(v_means), []
    for g in range(groups):
        chosen = ties[torch.arange(len(at), device=v.device), rank[g] + 1]  # [T, block_count]
        has_own = (chosen == own[:, None]).any(1)[:, None]
        chosen = chosen.masked_fill((chosen < 0) | (chosen == own[:, None]), none)
        rest = embedding_bag(chosen, blocks[:, g].contiguous(), mode="sum")
        inside = (sums[at + 1, g] - sums[own * block_size, g]) * has_own
        number = (chosen < none).sum(1, keepdim=True) * block_size + has_own * (at + 1 - own * block_size)[:, None]
        selected.append((rest + inside) / number)
    return compressed + torch.stack(selected, 1) + window


def tied_choice(own: torch.Tensor, block_size: int, block_count: int) -> torch.Tensor:
    """The blocks that a query of 0 in block `own` selects: int64 [*own.shape, 3, block_count], -1 for none.

    To such a query all blocks before its own are equally important, and its own more, as much, or less: the three
    choices. Which of equal blocks are kept follows from the order in which the public kernel compares and swaps: it
    sorts `block_size` blocks at a time, by a bitonic network, and merges the upper half of each sort with the best so
    far. It cannot keep more than half of a sort; where more are asked for, lower blocks go first.
    """
    steps = torch.arange(block_count, device=own.device)
    lowest = torch.where(steps <= own[..., None], steps, -1)[..., None, :].repeat_interleave(3, -2)
    many = own >= block_count
    if not many.any():
        return lowest
    if 2 * block_count > block_size:
        lowest[many, 0, -1] = own[many]
        return lowest
    tables = torch.cat([_tied_chunk(c, block_size) for c in range(int(own.max()) // block_size + 1)])
    lowest[many] = tables[own[many].cpu(), :, :block_count].to(own.device)
    return lowest


@functools.lru_cache(maxsize=256)
def _tied_chunk(chunk: int, block_size: int) -> torch.Tensor:
    """int64 [block_size, 3, block_size]: the best blocks, best first, for each own block in this chunk of blocks."""
    with torch.inference_mode(False):
        block = chunk * block_size + torch.arange(block_size)
        own = block[:, None, None]
        value = torch.where(block < own, 2, 0) + (block == own) * torch.tensor([[3], [2], [1]])  # [own, 3, block]
        order = torch.where(block <= own, block, -1).expand_as(value)
        best = _best_of_full(chunk, block_size) if chunk else None
        return _sort_into(best, value, order)[1]


@functools.lru_cache(maxsize=256)
def _best_of_full(chunks: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance and index [block_size] of the best of so many chunks of equally important blocks."""
    best = _best_of_full(chunks - 1, block_size) if chunks > 1 else None
    block = (chunks - 1) * block_size + torch.arange(block_size)
    return _sort_into(best, torch.full((block_size,), 2), block)


def _sort_into(best, value, order):
    """Sort a chunk [..., block_size] and merge its upper half with that of the `best` so far."""
    width = value.shape[-1]
    stages = width.bit_length() - 1
    descending = torch.arange(width)
    for stage in range(1, stages):
        value, order = _merge(value, order, stage, (descending >> stage) & 1 == 1)
    if best is None:
        return _merge(value, order, stages, descending >= 0)
    value, order = _merge(value, order, stages, descending < 0)
    upper = descending < width // 2
    value, order = (torch.where(upper, old, new) for old, new in zip(best, (value, order), strict=True))
    return _merge(value, order, stages, descending >= 0)


def _merge(value, order, stage, descending):
    """The last `stage` rounds of compare-and-swap of a bitonic merge; equal elements swap where it is descending."""
    for distance in (2**i for i in reversed(range(stage))):
        left, right = value.unflatten(-1, (-1, 2, distance)).unbind(-2)
        swap = (left > right) != descending.view(-1, 2, distance)[:, 0]
        swap = swap.unsqueeze(-2)
        value, order = (
            torch.where(swap, pairs.flip(-2), pairs).flatten(-3)
            for pairs in (x.unflatten(-1, (-1, 2, distance)) for x in (value, order))
        )
    return value, order


def _means(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Means of blocks, the last by its true length: [L, G, D] -> [blocks, G, D]"""
    whole = len(x) // block_size * block_size
    means = accumulate(x[:whole]).unflatten(0, (-1, block_size)).mean(1)
    if whole < len(x):
        means = torch.cat([means, accumulate(x[whole:]).mean(0, keepdim=True)])
    return means.to(x.dtype)


def _with_copies(o: torch.Tensor, heads: int) -> torch.Tensor:
    """Heads and their copies, of [n, 2 H or more, D], added up: they have the same gates."""
    return o[:, :heads] + o[:, heads : 2 * heads]
