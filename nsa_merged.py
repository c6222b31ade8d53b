"""The attention of `nsa_variant="merged"`: stock weights made sparse, without gates and without training.

A vision query attends, in one softmax, to all text tokens before it and to chosen blocks of its stream. Each block's
importance is estimated, see `nsa_torch.block_lse`. `docs/merged.md` compares it with dense attention and with others.
"""

import math

import torch

from .nsa_checks import check_arguments, check_block_count, check_text
from .nsa_softmax import (
    Part,
    accumulate,
    block_parts,
    by_pieces,
    is_cheaper_by_parts,
    masked,
    softmax_over,
    stream_index,
    visible_keys,
)
from .nsa_torch import block_means, choose
from .nsa_triton import (
    compressed_attention,
    prefix_attention,
    reads_lengths,
    remainder_attention,
    select_blocks,
    selected_attention,
)


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
    triton: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """One softmax over the text tokens before a query and the chosen blocks of its stream.

    Chosen are block 0, those that the window overlaps, then the most important (see `nsa_torch.select_blocks`): dense
    causal attention where these are all.

    Args:
        text_k, text_v: [T, G, D] keys and values of the text tokens, sample by sample.
        text_seen: int32 [N], how many text tokens of its sample come before a query; rises within a sample.
        cu_seqlens_text: int32 [B + 1], where each sample's text tokens start and end in T.
        window_size: tokens, the query's own included, whose blocks are always chosen.
        per_head: let each query head choose for itself, and not together with the others of its KV head.
        remainder: let each complete block that is not chosen enter, too, as one key and value, the means of its own,
            whose logit is raised by log(block_size), as if it stood for them all.
        triton: use the kernels of `nsa_triton`, not `nsa_softmax`.
        block_count, spread: as in `nsa_torch.select_blocks`; the others, and errors, as in `nsa_torch.nsa_attention`.

    Returns:
        [N, H, D] in the dtype of q. Differentiable in q, k, v, text_k and text_v; the choice carries no gradient.
    """
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    read_lengths = not triton or reads_lengths(q)
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, **sizes, read_lengths=read_lengths)
    check_text(q, k, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, read_lengths=read_lengths)
    check_block_count(block_count, block_size, window_size)

    attend = _by_kernels if triton else _by_parts
    places = (text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, cu_seqlens_k)
    options = {**sizes, "spread": spread, "remainder": remainder}
    if not per_head:
        return attend(q, k, v, *places, **options)
    # One query head of each KV head at a time.
    turns = q.unflatten(1, (k.shape[1], -1)).unbind(2)
    return torch.stack([attend(x, k, v, *places, **options) for x in turns], 2).flatten(1, 2)


def _by_parts(
    q, k, v, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, cu_seqlens_k, spread, remainder, **sizes
):
    """In plain PyTorch: one softmax over joined keys, piece by piece."""
    counts = cu_seqlens_text.diff().tolist()
    texts = list(zip(*(accumulate(x).split(counts) for x in (text_k, text_v)), strict=True))
    sample = torch.arange(len(texts), device=q.device).repeat_interleave(cu_seqlens.diff())  # [N]

    def attend(q, k, v, seen, sample):
        text_k, text_v = (x[: int(seen[-1])] for x in texts[int(sample[0])])
        return (_attend(q, k, v, text_k, text_v, seen, spread, remainder, **sizes),)

    (o,) = by_pieces(attend, (q[:0],), q, k, v, cu_seqlens, cu_seqlens_k, text_seen, sample)
    return o


def _attend(q, k, v, text_k, text_v, seen, spread, remainder, *, block_size, block_count, window_size, scale):
    """`merged_attention` of one piece (see nsa_softmax.py), whose last query sees all of text_k, text_v [t, G, D]."""
    n, last = len(k), len(text_k)
    index = stream_index(q, n - len(q))
    text = torch.arange(last, device=q.device) < seen[:, None]  # [C, t]

    def text_part(rows, g):
        return [Part(None, slice(0, last), text[rows])]

    if n <= block_count * block_size:
        # All blocks are chosen.
        chosen = text.new_ones(1, 1, (n - 1) // block_size + 1).expand(k.shape[1], len(q), -1)
    else:
        lse = None
        if spread:
            _, lse = softmax_over(q, text_k, text_v, scale, text_part, last)
        sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
        chosen = choose(q, k, lse, spread=spread, **sizes)

    keys, values = torch.cat([text_k, k]), torch.cat([text_v, v])
    if not remainder and not is_cheaper_by_parts(chosen, index, block_size, q.dtype):

        def visible(rows):
            blocks = visible_keys(chosen[:, rows], index[rows], block_size)  # [G, c, keys]
            return torch.cat([text[rows].expand(len(blocks), -1, -1), blocks], -1)

        return masked(q, keys, values, visible, scale)

    if remainder:
        means = block_means(k, block_size)
        complete = (index[:, None] + 1) // block_size
        rest = (torch.arange(len(means), device=q.device) < complete) & ~chosen[..., : len(means)]  # [G, C, means]
        keys = torch.cat([keys, means])
        values = torch.cat([values, block_means(v, block_size)])

    def parts(rows, g):
        found = text_part(rows, g) + block_parts(chosen[g, rows], index[rows], block_size, start=last)
        if remainder:
            bias = keys.new_full((), math.log(block_size)).where(rest[g, rows], -torch.inf)
            found.append(Part(None, slice(last + n, len(keys)), bias))
        return found

    own = block_size * chosen.sum().item() / chosen.numel()
    return softmax_over(q, keys, values, scale, parts, keys=max(last, own, len(keys) - last - n))[0]


def _by_kernels(
    q, k, v, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, cu_seqlens_k, spread, remainder, *,
    block_size, block_count, window_size, scale,
):  # fmt: skip
    """By the kernels: a softmax over the blocks, one over the text, and one over the means of the remainder, joined."""
    lengths = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    options = {**lengths, "block_size": block_size, "scale": scale}

    text_lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    if len(text_k) > 0:
        text_o, text_lse = prefix_attention(
            q, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, scale=scale, with_lse_gradient=True
        )

    lse = text_lse
    if not spread:
        with torch.no_grad():
            _, lse = compressed_attention(q, k, v, **options)
    blocks = select_blocks(q, k, lse, **options, block_count=block_count, window_size=window_size, spread=spread)

    o, lse = selected_attention(q, k, v, blocks, **options, with_lse_gradient=True)
    if len(text_k) > 0:
        o, lse = _join(o, lse, text_o, text_lse)
    if remainder:
        others, others_lse = remainder_attention(q, k, v, blocks, **options, with_lse_gradient=True)
        o, lse = _join(o, lse, others, others_lse + math.log(block_size))
    return o


def _join(o, lse, other, other_lse):
    """Of two softmaxes over different keys, o [N, H, D] and lse [N, H], the one over all of them."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(o, other, weight.to(o.dtype)), torch.logaddexp(lse, other_lse)
