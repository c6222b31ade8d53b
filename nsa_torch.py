"""Native Sparse Attention in plain PyTorch: the method as a specification, the oracle of the kernels, the CPU path.

The vision tokens of one sample are its *stream*. Block j of a stream holds the tokens j * S ... (j + 1) * S - 1, for
S = `block_size`. A query at index i of the stream lies in block c = i // S, its *own*, and attends three times:

    compression   softmax(q·k̃ᵀ) ṽ over the means k̃, ṽ of the blocks that end at or before i
    selection     softmax(q·kᵀ) v over the tokens up to i in `block_count` blocks: block 0, the previous and the own
                  one, and the most important others. The importance of a block before c is its probability in the
                  compression branch, summed over the query heads of a KV head, which therefore share the choice.
    window        softmax(q·kᵀ) v over the last `window_size` tokens up to i

`nsa_attention` adds these up, weighted by gates. Every function takes samples packed one after another. The sums
themselves are computed in `nsa_softmax.py`, which knows faster forms than one large mask. The plainest form, loops over
queries and heads, is `Brute` in `tests/brute.py`. `nsa_triton.py` has the same functions as kernels.
"""

import math

import torch
from torch.nn.functional import pad

from .nsa_checks import check_arguments, check_block_count
from .nsa_softmax import (
    RUN,
    Part,
    accumulate,
    bands,
    block_parts,
    by_pieces,
    causal,
    chunks,
    is_cheaper_at_once,
    is_cheaper_by_parts,
    masked,
    mixture,
    nothing_of,
    softmax_over,
    staircase,
    stream_index,
    visible_keys,
)


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
        means = block_means(k, block_size), block_means(v, block_size)
        chosen = None
        if len(k) > block_count * block_size:
            chosen = choose(q, k, block_size=block_size, block_count=block_count, scale=scale)
        if is_cheaper_at_once(q):
            return (mixture(q, k, v, means, gates, chosen, block_size, window_size, scale),)

        compression, selection, window = accumulate(gates).to(k.dtype).unsqueeze(-1).unbind(-2)  # 3 x [C, H, 1]
        out = compression * staircase(accumulate(q), *means, scale, len(k) - len(q), block_size)
        out = torch.addcmul(out, selection, see_chosen(q, k, v, chosen, block_size, scale))
        return (torch.addcmul(out, window, bands(q, k, v, window_size, scale)),)

    return by_pieces(attend, (q[:0],), q, k, v, cu_seqlens, cu_seqlens_k, gates, cut=block_count * block_size)[0]


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
    """The compression branch: attention over the means of the blocks that end at or before the query.

    Arguments and errors as in `nsa_attention`. Where no block is visible, o is 0 and lse is -inf.

    Returns:
        o [N, H, D] in the dtype of q, and lse [N, H], natural log, fp32 (fp64 for fp64 inputs), without gradient.
    """
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, block_size=block_size, scale=scale)

    def attend(q, k, v):
        means = block_means(k, block_size), block_means(v, block_size)
        return see_means(q, *means, len(k) - len(q), block_size, scale)

    return by_pieces(attend, nothing_of(q), q, k, v, cu_seqlens, cu_seqlens_k)


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
    """The blocks that each query selects: {0, c - 1, c} for own block c, then the most important others.

    Importance is defined at the head of this file (arXiv 2502.11089 eq. 8-10). Ties go to the lower index.

    Args:
        lse: [N, H] from `compressed_attention`; with `spread`, that of the other keys in the softmax, -inf where there
            are none. The others as in `nsa_attention`.
        window_size: always choose the blocks that this many last tokens overlap, and block 0; default block_size + 1,
            which are the previous and the own block.
        spread: importance is the share of one softmax, over the blocks before c and the keys behind `lse`, that a
            block's tokens would get, estimated by `block_lse` from means and variances of its keys. A mean alone hides
            a single strong key.
        own_importance: [G, N], not negative. If given, no block is always chosen: block c has this importance.

    The last three are for the variants "merged" and "released". Block means are not rounded here, as they are in
    `nsa_triton`: near ties of 16-bit inputs may fall otherwise.

    Returns:
        int32 [G, N, block_count], ascending, padded with -1 where fewer blocks are chosen.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    check_arguments(q, k, None, cu_seqlens, cu_seqlens_k, lse=lse, own_importance=own_importance, **sizes)
    if window_size is not None:
        check_block_count(block_count, block_size, window_size)

    def attend(q, k, _, lse, own_importance=None):
        chosen = choose(q, k, lse, own_importance, **sizes, spread=spread)  # [G, C, blocks so far]
        count = chosen.shape[-1]
        block = torch.arange(count, device=q.device)
        blocks = block.where(chosen, count).sort(-1).values[..., :block_count]
        blocks = blocks.masked_fill(blocks == count, -1).int()
        return (pad(blocks, (0, block_count - blocks.shape[-1]), value=-1).transpose(0, 1),)

    per_query = (lse,) if own_importance is None else (lse, own_importance.T)
    nothing = lse.new_empty(0, k.shape[1], block_count, dtype=torch.int32)
    (blocks,) = by_pieces(attend, (nothing,), q, k, k, cu_seqlens, cu_seqlens_k, *per_query)
    return blocks.transpose(0, 1).contiguous()


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
    """The selection branch: attention over the tokens up to the query in its chosen blocks.

    Args:
        blocks: int32 [G, N, any] block indices of each query within its own sample, -1 for none; the others, and
            what is returned, as in `compressed_attention`.
    """
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, blocks=blocks, block_size=block_size, scale=scale)

    def attend(q, k, v, blocks):
        blocks = blocks.transpose(0, 1).long()
        count = (len(k) - 1) // block_size + 1
        blocks = blocks.masked_fill((blocks < 0) | (blocks >= count), count)
        chosen = blocks.new_zeros(*blocks.shape[:2], count + 1, dtype=torch.bool).scatter_(2, blocks, True)
        return _selected(q, k, v, chosen[..., :count], block_size, scale)

    return by_pieces(attend, nothing_of(q), q, k, v, cu_seqlens, cu_seqlens_k, blocks.transpose(0, 1))


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
    """The window branch: attention over the last `window_size` tokens up to the query; as `compressed_attention`."""
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, window_size=window_size, scale=scale)

    def attend(q, k, v):
        first = len(k) - len(q)
        index = stream_index(q, first)

        def parts(rows, g):
            seen = slice(max(0, first + rows.start - window_size + 1), first + rows.stop)
            key = torch.arange(seen.start, seen.stop, device=q.device)
            i = index[rows, None]
            return [Part(None, seen, (key <= i) & (key > i - window_size))]

        return softmax_over(q, k, v, scale, parts, step=RUN)

    return by_pieces(attend, nothing_of(q), q, k, v, cu_seqlens, cu_seqlens_k)


# ----------------------------------------------------------------------------------------------------------------------
# The branches of one piece: q [C, H, D], the last C of the n tokens of k and v [n, G, D]; o [C, H, D] and lse [C, H]
# ----------------------------------------------------------------------------------------------------------------------


def see_means(q, k, v, first, block_size, scale):
    """Attention of queries first ... first + C - 1 over the means of the blocks that are complete by then."""
    complete = (stream_index(q, first)[:, None] + 1) // block_size  # [C, 1]
    block = torch.arange(len(k), device=q.device)

    def parts(rows, g):
        seen = slice(0, (first + rows.stop) // block_size)
        return [Part(None, seen, block[seen] < complete[rows])]

    return softmax_over(q, k, v, scale, parts, keys=len(k))


@torch.no_grad()
def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    own_importance: torch.Tensor | None = None,
    *,
    block_size: int,
    block_count: int,
    window_size: int | None = None,
    spread: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Which blocks each query of a piece selects, bool [G, C, blocks]: see `select_blocks`. Default of lse [C, H]: that
    of the compression branch. own_importance [C, G]."""
    window_size = block_size + 1 if window_size is None else window_size
    index = stream_index(q, len(k) - len(q))
    block = torch.arange((len(k) - 1) // block_size + 1, device=q.device)
    means = block_means(k, block_size)

    def choose_chunk(rows):
        i = index[rows, None]
        own = i // block_size  # [c, 1]
        if lse is not None:
            others = lse[rows].unflatten(1, (k.shape[1], -1)).transpose(0, 1).unsqueeze(-1)  # [G, c, r, 1]
        if spread:
            logits = block_lse(accumulate(q[rows]), k, block_size, scale)  # [G, c, r, complete blocks]
            logits = logits.masked_fill((block[: len(means)] >= own)[:, None], -torch.inf)
            probability = torch.cat([logits, others.to(logits.dtype)], -1).softmax(-1)[..., :-1]
        else:
            logits = _logits(accumulate(q[rows]), means, scale)
            if lse is None:
                incomplete = block[: len(means)] >= (i + 1) // block_size
                probability = logits.masked_fill(incomplete[:, None], -torch.inf).softmax(-1)
            else:
                probability = (logits - others).exp()
        importance = probability.sum(2)  # over the query heads of a KV head: [G, c, complete blocks]
        importance = pad(importance, (0, len(block) - len(means))).masked_fill(block >= own, 0)

        if own_importance is None:
            forced = (block == 0) | (block >= (i - window_size + 1) // block_size)
            order = importance.masked_fill(forced, torch.inf)
        else:
            own_row = own_importance[rows].T.unsqueeze(-1).to(importance.dtype)
            order = torch.where(block == own, own_row, importance)
        order = order.masked_fill(block > own, -torch.inf)

        least = order.topk(min(block_count, len(block)), -1).values[..., -1:]
        above = order > least
        ties = (order == least) & (order > -torch.inf)
        return above | (ties & (ties.cumsum(-1) <= block_count - above.sum(-1, keepdim=True)))

    return torch.cat([choose_chunk(rows) for rows in chunks(q, q.shape[1] * len(block))], 1)


def _selected(q, k, v, chosen, block_size, scale, with_lse=True):
    """Attention over the tokens up to the query in its blocks, chosen bool [G, C, blocks]; lse only if asked for."""
    index = stream_index(q, len(k) - len(q))
    if not with_lse and not is_cheaper_by_parts(chosen, index, block_size, q.dtype):
        return masked(q, k, v, lambda rows: visible_keys(chosen[:, rows], index[rows], block_size), scale), None

    def parts(rows, g):
        if q.device.type != "cpu":
            # A GPU would wait for itself at every block.
            visible = visible_keys(chosen[g : g + 1, rows], index[rows], block_size)[0]
            return [Part(None, slice(0, visible.shape[-1]), visible)]
        return block_parts(chosen[g, rows], index[rows], block_size)

    keys = len(k) if q.device.type != "cpu" else block_size * chosen.sum().item() / chosen.numel()
    return softmax_over(q, k, v, scale, parts, keys)


def see_chosen(q, k, v, chosen, block_size, scale):
    """o of the selection branch; chosen bool [G, C, blocks], or None for all blocks."""
    if chosen is None:
        return causal(q, k, v, scale)
    return _selected(q, k, v, chosen, block_size, scale, with_lse=False)[0]


def block_means(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Means over complete blocks: [n, G, D] -> [blocks, G, D]."""
    count = len(x) // block_size
    return x[: count * block_size].unflatten(0, (count, block_size)).mean(1)


def block_lse(q: torch.Tensor, k: torch.Tensor, block_size: int, scale: float | None) -> torch.Tensor:
    """Estimated log-sum-exp of the logits of each block's keys, [G, C, r, complete blocks].

    The logits of a query are taken as `block_size` draws from a normal distribution of mean q·μ and variance
    σ² = Σ_d q_d² var_d, for the mean μ and the variances var of the keys' channels. Their log-sum-exp is then about
    q·μ + σ²/2 + ln S up to σ = (2 ln S)^½, and beyond, where the largest draw is all that counts, q·μ + σ (2 ln S)^½
    (the random energy model, Derrida, Phys. Rev. B 24, 2613, 1981).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    limit = math.sqrt(2 * math.log(block_size))
    count = len(k) // block_size
    blocks = k[: count * block_size].unflatten(0, (count, block_size))
    means = blocks.mean(1)
    variance = _logits(q.square(), (blocks - means[:, None]).square().mean(1), scale * scale)
    raised = torch.where(variance < limit**2, (variance + limit**2) / 2, limit * variance.sqrt())
    return _logits(q, means, scale) + raised


def _logits(q, k, scale):
    """q [C, H, D], k [m, G, D] -> [G, C, H / G, m]"""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("cgrd,mgd->gcrm", q.unflatten(1, (k.shape[1], -1)), k) * scale
