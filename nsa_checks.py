"""Checks of the arguments of the attention functions in the other `nsa_` files."""

import torch

# Of `nsa_attention`, in the order of its gates.
BRANCHES = ("compression", "selection", "window")


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
    first: int | None = None,
    block_size: int | None = None,
    read_lengths: bool = True,
    **sizes: int | float | None,
) -> None:
    """Raise a ValueError that names the first argument which does not fit the others.

    Args:
        cu_seqlens: None for `pooled_attention`, which has `first`.
        read_lengths: Check the values of cu_seqlens, too. That waits for the device that they are on.
        sizes: See `_check_sizes`.
    """
    _check_qkv(q, k, v)
    _check_per_query(q, k, gates, lse, blocks, own_importance)
    _check_sizes(block_size, **sizes)

    if first is not None:
        if first < 0:
            raise ValueError(f"first must be at least 0, got {first}")
        expected = (first + len(q)) // block_size
        if len(k) != expected:
            raise ValueError(f"k must have (first + queries) // block_size = {expected} rows, got {len(k)}")
        return

    _check_lengths("cu_seqlens", cu_seqlens, q, "q", read_lengths)
    if cu_seqlens_k is None:
        if len(k) != len(q):
            raise ValueError(f"k must have {len(q)} tokens like q where cu_seqlens_k is not given, got {len(k)}")
        return

    _check_lengths("cu_seqlens_k", cu_seqlens_k, k, "k", read_lengths)
    same_samples = cu_seqlens_k.shape == cu_seqlens.shape
    if not same_samples or (read_lengths and (cu_seqlens_k.diff() < cu_seqlens.diff()).any()):
        raise ValueError(
            "cu_seqlens_k must describe the samples of cu_seqlens, each with at least as many keys as queries, "
            f"got {cu_seqlens_k.tolist()} and {cu_seqlens.tolist()}"
        )


def check_text(
    q: torch.Tensor,
    k: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    text_seen: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_text: torch.Tensor,
    *,
    read_lengths: bool = True,
) -> None:
    """As `check_arguments`, for what `merged_attention` takes of the text."""
    for name, x in (("text_k", text_k), ("text_v", text_v)):
        if x.ndim != 3 or x.shape[1:] != k.shape[1:] or len(x) != len(text_k):
            raise ValueError(f"{name} must be [text tokens, {k.shape[1]}, {k.shape[2]}] like k, got {list(x.shape)}")
        _check_like_q(name, x, q)

    names = ("text_k", "text_seen", "cu_seqlens_text")
    _check_seen(q, text_k, text_seen, cu_seqlens, cu_seqlens_text, names, read_lengths)


def check_prefix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    scale: float | None = None,
    read_lengths: bool = True,
) -> None:
    """As `check_arguments`, for what `prefix_attention` takes."""
    _check_qkv(q, k, v)
    _check_sizes(None, scale=scale)
    _check_lengths("cu_seqlens", cu_seqlens, q, "q", read_lengths)

    _check_seen(q, k, seen, cu_seqlens, cu_seqlens_k, ("k", "seen", "cu_seqlens_k"), read_lengths)


def check_block_count(block_count: int, block_size: int, window_size: int) -> None:
    """Raise a ValueError if `block_count` is below the number of blocks that are always chosen for a window."""
    # The first block, and what a window overlaps at most.
    least = 3 + (window_size - 2) // block_size
    if block_count < least:
        raise ValueError(
            f"block_count must be at least {least}, the blocks that are always chosen for a window of {window_size}: "
            f"got {block_count}"
        )


def _check_qkv(q, k, v) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q must be a floating-point tensor [tokens, heads, dim], got {q.dtype} {list(q.shape)}")
    _, heads, dim = q.shape

    if k.ndim != 3 or k.shape[2] != dim:
        raise ValueError(f"k must be [tokens, kv heads, {dim}] like q {list(q.shape)}, got {list(k.shape)}")
    groups = k.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"the heads of q must be a multiple of the heads of k, got {heads} and {groups}")
    _check_like_q("k", k, q)

    if v is not None:
        if v.shape != k.shape:
            raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
        _check_like_q("v", v, q)


def _check_per_query(q, k, gates, lse, blocks, own_importance) -> None:
    n, heads, _ = q.shape
    groups = k.shape[1]

    wanted = (n, heads, len(BRANCHES))
    if gates is not None and (gates.shape != wanted or gates.device != q.device):
        raise ValueError(f"gates must be {[*wanted]} on {q.device}, got {list(gates.shape)} on {gates.device}")

    if lse is not None and (lse.shape != (n, heads) or not lse.is_floating_point() or lse.device != q.device):
        raise ValueError(f"lse must be floating-point {[n, heads]} on {q.device}, got {_describe(lse)}")

    if blocks is not None:
        fits = blocks.ndim == 3 and blocks.shape[:2] == (groups, n)
        if not fits or blocks.dtype != torch.int32 or blocks.device != q.device:
            raise ValueError(f"blocks must be int32 [{groups}, {n}, count] on {q.device}, got {_describe(blocks)}")

    if own_importance is not None and (own_importance.shape != (groups, n) or own_importance.device != q.device):
        got = f"{list(own_importance.shape)} on {own_importance.device}"
        raise ValueError(f"own_importance must be {[groups, n]} on {q.device}, got {got}")


def _check_sizes(
    block_size: int | None,
    block_count: int | None = None,
    window_size: int | None = None,
    scale: float | None = None,
) -> None:
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


def _check_lengths(name: str, cu_seqlens: torch.Tensor, counted: torch.Tensor, counted_name: str, read: bool) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must be int32 [samples + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != counted.device:
        raise ValueError(f"{name} must be on {counted.device} like {counted_name}, got {cu_seqlens.device}")
    if not read:
        return

    values = cu_seqlens.tolist()
    n = len(counted)
    if values[0] != 0 or values[-1] != n or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to the {n} tokens of {counted_name}, got {values}")


def _check_seen(q, k, seen, cu_seqlens, cu_seqlens_k, names: tuple[str, str, str], read: bool) -> None:
    """`seen` counts, for each query, keys of its sample; `names` are those of k, seen and cu_seqlens_k."""
    k_name, seen_name, lengths_name = names
    _check_lengths(lengths_name, cu_seqlens_k, k, k_name, read)

    samples = len(cu_seqlens) - 1
    if len(cu_seqlens_k) - 1 != samples:
        got = len(cu_seqlens_k) - 1
        raise ValueError(f"{lengths_name} must describe the {samples} samples of cu_seqlens, got {got}")
    if seen.dtype != torch.int32 or seen.shape != q.shape[:1] or seen.device != q.device:
        raise ValueError(f"{seen_name} must be int32 [{len(q)}] on {q.device}, got {_describe(seen)}")


def _check_like_q(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.dtype != q.dtype or x.device != q.device:
        raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")


def _describe(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
