"""Native Sparse Attention as Triton kernels: the functions of `nsa_torch.py`, with the same arguments and results.

How the work is cut (r query heads share a KV head; a *tile* is a run of adjacent queries of one sample):
  compression  flash attention over block means, one head of a tile at a time                  `_compressed_kernel`
  choice       importance of the blocks for a chunk of tiles, the top ones by bisection  `_importance_`, `_top_kernel`
  selection    the union of a tile's blocks, each with the set of queries that chose it              `_union_kernel`
               flash attention of a tile's r heads as rows over that union                        `_selected_kernel`
  window       flash attention over a band of keys                                                  `_window_kernel`
The selection kernel also adds the gated branches up. Nothing waits for the device, no atomics: results repeat exactly.
Dots accumulate in fp32; those of fp32 inputs are IEEE. Forward only: `available` sends training to `nsa_torch.py`.
"""

import functools
import os

import torch

from .nsa_torch import check_arguments

try:
    import triton
    import triton.language as tl
except ImportError:  # importing this file must not fail: `available` then says no

    class tl:
        constexpr = None

    triton = None

# The kernels pass their tests in triton's interpreter and compile for sm_80, sm_89 and sm_90, but these tests have not
# run on a GPU yet. Until they have, "auto" leaves the kernels; `nsa_backend="triton"` takes them.
TRUSTED = False
MAX_IMPORTANCE = 2**26  # importance values of a chunk: 256 MB in fp32


def available(*tensors: torch.Tensor) -> bool:
    """Whether `nsa_backend="auto"` takes the kernels for a call on these tensors: on a CUDA device, without a gradient
    to come, and once `TRUSTED`."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return TRUSTED and triton is not None and tensors[0].device.type == "cuda" and not needs_grad


def _on_device(function):
    """Launch on the device of q, which need not be the current one."""

    @functools.wraps(function)
    def wrapped(q, *args, **kwargs):
        with torch.cuda.device_of(q):
            return function(q, *args, **kwargs)

    return wrapped


@_on_device
def nsa_attention(
    q, k, v, gates, cu_seqlens, *, cu_seqlens_k=None, block_size=64, block_count=32, window_size=256, scale=None
):
    """See `nsa_torch.nsa_attention`."""
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, gates=gates, **sizes)
    lengths = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    blocking = {"block_size": block_size, "scale": scale}
    means = _block_means(k, v, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, block_size)
    o_cmp, lse = _compressed(q, means, **lengths, **blocking)
    blocks = _select(q, means, lse, **lengths, **blocking, block_count=block_count)
    o_win, _ = window_attention(q, k, v, **lengths, window_size=window_size, scale=scale)
    return _selected(q, k, v, blocks, **lengths, **blocking, branches=(gates.contiguous(), o_cmp, o_win))[0]


@_on_device
def compressed_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, block_size=64, scale=None):
    """See `nsa_torch.compressed_attention`. Block means are rounded to the dtype of k."""
    _check(q, k, v, cu_seqlens, cu_seqlens_k, block_size=block_size)
    means = _block_means(k, v, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, block_size)
    return _compressed(q, means, cu_seqlens, cu_seqlens_k, block_size, scale)


@_on_device
def select_blocks(q, k, lse, cu_seqlens, *, cu_seqlens_k=None, block_size=64, block_count=32, scale=None):
    """See `nsa_torch.select_blocks`."""
    _check(q, k, None, cu_seqlens, cu_seqlens_k, lse=lse, block_size=block_size, block_count=block_count)
    means = _block_means(k, k, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, block_size)
    return _select(q, means, lse, cu_seqlens, cu_seqlens_k, block_size, block_count, scale)


@_on_device
def selected_attention(q, k, v, blocks, cu_seqlens, *, cu_seqlens_k=None, block_size=64, scale=None):
    """See `nsa_torch.selected_attention`."""
    _check(q, k, v, cu_seqlens, cu_seqlens_k, blocks=blocks, block_size=block_size)
    return _selected(q, k, v, blocks, cu_seqlens, cu_seqlens_k, block_size, scale)


@_on_device
def window_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, window_size=256, scale=None):
    """See `nsa_torch.window_attention`."""
    _check(q, k, v, cu_seqlens, cu_seqlens_k, window_size=window_size)
    call = _Call(q, cu_seqlens, cu_seqlens_k, scale)
    o, lse = call.outputs()
    config = _config("window", q)
    tiles = _cut(cu_seqlens, config["BM"], len(q))
    if len(q):
        _window_kernel[len(tiles), call.heads](
            call.q, k.contiguous(), v.contiguous(), o, lse, tiles, *call.lengths, call.scale, window_size,
            G=k.shape[1], **call.shape, **config,
        )  # fmt: skip
    return o, lse


def _compressed(q, means, cu_seqlens, cu_seqlens_k, block_size, scale):
    call = _Call(q, cu_seqlens, cu_seqlens_k, scale)
    o, lse = call.outputs()
    config = _config("compressed", q)
    tiles = _cut(cu_seqlens, config["BM"], len(q))
    if len(q):
        _compressed_kernel[len(tiles), call.heads](
            call.q, *means[:2], o, lse, tiles, *call.lengths, means[2], call.scale,
            G=means[0].shape[1], S=block_size, **call.shape, **config,
        )  # fmt: skip
    return o, lse


def _select(q, means, lse, cu_seqlens, cu_seqlens_k, block_size, block_count, scale):
    """Importance of a chunk of tiles at a time: its size is bounded, and it stays in the cache."""
    call = _Call(q, cu_seqlens, cu_seqlens_k, scale)
    k_means, _, cu_blocks, n_keys = means
    groups = k_means.shape[1]
    n_blocks = (n_keys - 1) // block_size + 1  # of any sample, at most: lengths stay on the device
    blocks = torch.empty(groups, len(q), block_count, dtype=torch.int32, device=q.device)
    if len(q) == 0:
        return blocks
    config = _config("importance", q)
    tile_rows = config["BM"]
    tiles = _cut(cu_seqlens, tile_rows, len(q))
    everything = n_blocks <= block_count  # then there is nothing to compare
    step = max(1, MAX_IMPORTANCE // (groups * n_blocks * tile_rows))
    top = _top_config(n_blocks)
    lse = lse.contiguous()
    for start in range(0, len(tiles), step):
        count = min(step, len(tiles) - start)
        size = 1 if everything else groups * count * tile_rows * n_blocks
        importance = torch.empty(size, dtype=torch.float32, device=q.device)
        if not everything:
            _importance_kernel[triton.cdiv(n_blocks, config["BN"]), count, groups](
                call.q, k_means, lse, importance, tiles, *call.lengths, cu_blocks, call.scale, start, n_blocks,
                G=groups, S=block_size, **call.shape, **config,
            )  # fmt: skip
        _top_kernel[count * tile_rows // top["ROWS"], groups](
            importance, blocks, tiles, *call.lengths, start, n_blocks, len(q),
            S=block_size, COUNT=block_count, COUNT_P2=triton.next_power_of_2(block_count), BM=tile_rows,
            EVERYTHING=everything, **top,
        )  # fmt: skip
    return blocks


def _selected(q, k, v, blocks, cu_seqlens, cu_seqlens_k, block_size, scale, branches=None):
    """branches: gates [N, H, 3] and the outputs of compression and window, to return the gated sum instead of o."""
    call = _Call(q, cu_seqlens, cu_seqlens_k, scale)
    o, lse = call.outputs()
    if len(q) == 0:
        return o, lse
    groups, count = k.shape[1], blocks.shape[2]
    heads_p2 = triton.next_power_of_2(call.heads // groups)
    config = _config("selected", q)
    tile = max(min(config.pop("BM") // heads_p2, 32), 16 // heads_p2)  # queries: a bit each, at least 16 rows
    config["BN"] = min(config["BN"], block_size)
    count_p2 = triton.next_power_of_2(count)
    tiles = _cut(cu_seqlens, tile, len(q))
    union = torch.empty(2, groups, len(tiles), tile * count_p2, dtype=torch.int32, device=q.device)
    sizes = torch.empty(groups, len(tiles), 2, dtype=torch.int32, device=q.device)
    _union_kernel[len(tiles), groups](
        blocks.contiguous(), *union, sizes, tiles, *call.lengths, len(q),
        S=block_size, COUNT=count, COUNT_P2=count_p2, BQ=tile, num_warps=4,
    )  # fmt: skip
    gates, o_cmp, o_win = branches or (q, q, q)
    _selected_kernel[len(tiles), groups](
        call.q, k.contiguous(), v.contiguous(), o, lse, *union, sizes, tiles, *call.lengths, gates, o_cmp, o_win,
        call.scale, G=groups, S=block_size, BQ=tile, UNION=tile * count_p2, HEADS_P2=heads_p2,
        GATED=branches is not None, **call.shape, **config,
    )  # fmt: skip
    return o, lse


class _Call:
    """What every kernel of a call gets: contiguous queries, lengths, the scale in units of log 2, head shapes."""

    def __init__(self, q, cu_seqlens, cu_seqlens_k, scale):
        _, self.heads, dim = q.shape
        self.q = q.contiguous()
        self.lengths = (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
        self.scale = (dim**-0.5 if scale is None else scale) * 1.4426950408889634
        precision = "ieee" if q.dtype == torch.float32 else "tf32"  # the latter says nothing for 16-bit inputs
        self.shape = {"H": self.heads, "D": dim, "D_P2": triton.next_power_of_2(dim), "PRECISION": precision}

    def outputs(self):
        return torch.empty_like(self.q), self.q.new_empty(self.q.shape[:2], dtype=torch.float32)


def _check(q, k, v, cu_seqlens, cu_seqlens_k, **arguments):
    if triton is None:
        raise ImportError("nsa_triton needs triton (pip install triton); nsa_torch computes the same without it")
    if not _can_launch(q.device):
        raise ValueError(f"q must be on a CUDA device for the Triton kernels, got {q.device}; nsa_torch runs anywhere")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be fp16, bf16 or fp32 for the kernels, got {q.dtype}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, arguments.get("gates"))):
        raise NotImplementedError("nsa_triton has no backward pass yet; nsa_torch does, or call under torch.no_grad()")
    # To read lengths on a GPU would wait for it.
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, read_lengths=q.device.type == "cpu", **arguments)


def _cut(cu_seqlens, size, total, complete=False):
    """Cut samples into pieces of `size` tokens: int32 [pieces, 2] (sample, first token in it).

    How many there are is known on the device alone; surplus pieces begin at or after the end of the last sample. With
    `complete`, only pieces of full size.
    """
    counts = (cu_seqlens.diff() + (0 if complete else size - 1)) // size
    ends = counts.cumsum(0)
    piece = torch.arange(total // size + (0 if complete else len(counts)), device=cu_seqlens.device)
    sample = torch.searchsorted(ends, piece, right=True).clamp(max=len(counts) - 1)
    return torch.stack([sample, (piece - (ends - counts)[sample]) * size], 1).int()


def _block_means(k, v, cu_seqlens, block_size):
    """Means of k and v over complete blocks, [blocks, G, D] in their dtype; cu_blocks int32 [B + 1]; and len(k)."""
    k, v = k.contiguous(), v.contiguous()
    tokens, groups, dim = k.shape
    pieces = _cut(cu_seqlens, block_size, tokens, complete=True)
    k_means, v_means = (x.new_empty(max(1, len(pieces)), groups, dim) for x in (k, v))
    if len(pieces):
        _means_kernel[len(pieces), groups](
            k, v, k_means, v_means, pieces, cu_seqlens,
            G=groups, D=dim, D_P2=triton.next_power_of_2(dim), S=block_size, num_warps=4,
        )  # fmt: skip
    cu_blocks = torch.nn.functional.pad((cu_seqlens.diff() // block_size).cumsum(0), (1, 0)).int()
    return k_means, v_means, cu_blocks, tokens


# Rows (queries, or queries times heads) and keys of a tile, by what compiles without spilling at a head dim of 128.
_HOPPER = {
    "compressed": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "importance": {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 2},
    "selected": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
    "window": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
}
_AMPERE = {
    "compressed": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "importance": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "selected": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "window": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
}
_FP32 = dict.fromkeys(_HOPPER, {"BM": 32, "BN": 16, "num_warps": 8, "num_stages": 1})


def _config(kernel: str, q: torch.Tensor) -> dict:
    """Tile sizes and launch options of a kernel for the device and dtype of q; never by sequence length."""
    if q.dtype == torch.float32:
        return dict(_FP32[kernel])
    return dict((_HOPPER if _capability(q.device) >= (9, 0) else _AMPERE)[kernel])


def _can_launch(device: torch.device) -> bool:
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _top_config(n_blocks: int) -> dict:
    """A row of importance lives in registers, 64 values per thread; short rows share a warp's program."""
    width = max(triton.next_power_of_2(n_blocks), 16)
    return {"WIDTH": width, "ROWS": min(16, max(1, 1024 // width)), "num_warps": min(16, max(1, width // 2048))}


def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _load(pointer, at, keep, D: tl.constexpr, D_P2: tl.constexpr, MASK: tl.constexpr):
    """Rows [n, D_P2] at the offsets `at` [n]; 0 beyond D, and where `keep` [n] is false if MASK says that matters."""
    d = tl.arange(0, D_P2)
    where = pointer + at[:, None] + d[None, :]
    if MASK and D == D_P2:
        x = tl.load(where, mask=keep[:, None], other=0.0)
    elif MASK:
        x = tl.load(where, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    elif D == D_P2:
        x = tl.load(where)
    else:
        x = tl.load(where, mask=tl.broadcast_to((d < D)[None, :], where.shape), other=0.0)
    return x


@_jit
def _store(pointer, at, keep, x, D: tl.constexpr, D_P2: tl.constexpr):
    d = tl.arange(0, D_P2)
    tl.store(pointer + at[:, None] + d[None, :], x.to(pointer.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@_jit
def _softmax_step(acc, top, total, x, v, scale, on, PRECISION: tl.constexpr):
    """Online softmax over a tile of keys: logits x [R, n] (times `scale`, in units of log 2; -inf where masked), values
    v [n, D]. Rows where `on` [R] is false do not take part: their shift is +inf, which costs less than a mask."""
    new_top = tl.where(on, tl.maximum(top, tl.max(x, 1) * scale), top)
    p = tl.math.exp2(x * scale - tl.where(on, new_top, float("inf"))[:, None])
    old = tl.math.exp2(top - new_top)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
    return acc, new_top, total * old + tl.sum(p, 1)


@_jit
def _finish(acc, top, total):
    """o [R, D] and the natural log-sum-exp [R] of an online softmax; 0 and -inf where there was no key."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))


@_jit
def _place(TILES, CU_Q, CU_K, tile):
    """Of a tile: its sample, first query in it, the sample's first query and key, and its number of either."""
    sample = tl.load(TILES + 2 * tile)
    first = tl.load(TILES + 2 * tile + 1)
    q0 = tl.load(CU_Q + sample)
    k0 = tl.load(CU_K + sample)
    return sample, first, q0, k0, tl.load(CU_Q + sample + 1) - q0, tl.load(CU_K + sample + 1) - k0


@_jit
def _means_kernel(K, V, KM, VM, PIECES, CU_K, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, S: tl.constexpr):
    """Mean of a block of k and v: KM, VM [blocks, G, D]."""
    j = tl.program_id(0)
    g = tl.program_id(1)
    sample = tl.load(PIECES + 2 * j)
    first = tl.load(PIECES + 2 * j + 1)
    start = tl.load(CU_K + sample)
    if start + first + S <= tl.load(CU_K + sample + 1):
        at = ((start + first + tl.arange(0, S)).to(tl.int64) * G + g) * D
        d = tl.arange(0, D_P2)
        out = (j.to(tl.int64) * G + g) * D + d
        k = tl.sum(_load(K, at, at >= 0, D, D_P2, False).to(tl.float32), 0) / S
        tl.store(KM + out, k.to(KM.dtype.element_ty), mask=d < D)
        v = tl.sum(_load(V, at, at >= 0, D, D_P2, False).to(tl.float32), 0) / S
        tl.store(VM + out, v.to(VM.dtype.element_ty), mask=d < D)


@_jit
def _compressed_kernel(
    Q, KM, VM, OUT, LSE, TILES, CU_Q, CU_K, CU_B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(q·k̃ᵀ) ṽ of one head of a tile, over the blocks that end at or before each query."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    h = tl.program_id(1)
    sample, first, q0, k0, n_q, n_k = _place(TILES, CU_Q, CU_K, tile)
    if first < n_q:
        b0 = tl.load(CU_B + sample)
        g = h // (H // G)
        m = first + tl.arange(0, BM)
        row = m < n_q
        i = n_k - n_q + m  # stream index
        at = ((q0 + m).to(tl.int64) * H + h) * D
        q = _load(Q, at, row, D, D_P2, True)
        acc = tl.zeros((BM, D_P2), tl.float32)
        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        j = tl.arange(0, BN)
        by_all = (n_k - n_q + first + 1) // S // BN * BN  # blocks that every row sees, in whole tiles
        by_any = (n_k - n_q + tl.minimum(first + BM, n_q)) // S
        for start in range(0, by_all, BN):
            block = ((b0 + start + j).to(tl.int64) * G + g) * D
            x = tl.dot(q, tl.trans(_load(KM, block, row, D, D_P2, False)), input_precision=PRECISION)
            v = _load(VM, block, row, D, D_P2, False)
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, row, PRECISION)
        for start in range(by_all, by_any, BN):
            block = ((b0 + start + j).to(tl.int64) * G + g) * D
            there = start + j < by_any
            x = tl.dot(q, tl.trans(_load(KM, block, there, D, D_P2, True)), input_precision=PRECISION)
            x = tl.where((start + j)[None, :] < ((i + 1) // S)[:, None], x, float("-inf"))
            v = _load(VM, block, there, D, D_P2, True)
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, row, PRECISION)
        o, lse = _finish(acc, top, total)
        _store(OUT, at, row, o, D, D_P2)
        tl.store(LSE + (q0 + m).to(tl.int64) * H + h, lse, mask=row)


@_jit
def _importance_kernel(
    Q, KM, LSE, IMPORTANCE, TILES, CU_Q, CU_K, CU_B, scale, tile0, n_blocks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compression probabilities of a tile's queries for BN blocks, summed over the heads of a group, one after another
    so that nothing is summed across rows: IMPORTANCE [G, rows of the chunk, n_blocks]."""
    start = tl.program_id(0) * BN
    local = tl.program_id(1)
    g = tl.program_id(2)
    sample, first, q0, k0, n_q, n_k = _place(TILES, CU_Q, CU_K, tile0 + local)
    own = (n_k - n_q + tl.minimum(first + BM, n_q) - 1) // S  # of the last query
    if (first < n_q) & (start < own):
        b0 = tl.load(CU_B + sample)
        m = first + tl.arange(0, BM)
        row = m < n_q
        j = start + tl.arange(0, BN)
        k = _load(KM, ((b0 + j).to(tl.int64) * G + g) * D, j < own, D, D_P2, True)
        importance = tl.zeros((BM, BN), tl.float32)
        for r in range(H // G):
            head = (q0 + m).to(tl.int64) * H + g * (H // G) + r
            q = _load(Q, head * D, row, D, D_P2, True)
            lse = tl.load(LSE + head, mask=row, other=0.0) * 1.4426950408889634
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            importance += tl.math.exp2(x * scale - lse[:, None])
        out = (g * tl.num_programs(1) + local).to(tl.int64) * BM + tl.arange(0, BM)
        where = IMPORTANCE + out[:, None] * n_blocks + j[None, :]
        tl.store(where, importance, mask=row[:, None] & (j < n_blocks)[None, :])


@_jit
def _top_kernel(
    IMPORTANCE, BLOCKS, TILES, CU_Q, CU_K, tile0, n_blocks, n,
    S: tl.constexpr, COUNT: tl.constexpr, COUNT_P2: tl.constexpr, BM: tl.constexpr, EVERYTHING: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The COUNT most important blocks of ROWS queries, ascending, -1 padded: BLOCKS [G, n, COUNT].

    Floats that are not negative order as their bits do, so a bisection on the bits finds the importance of the last
    block to choose in at most 31 steps, exactly; blocks of equal importance there are taken from the lowest index on.
    """
    chunk_row = tl.program_id(0) * ROWS
    g = tl.program_id(1)
    sample, first, q0, k0, n_q, n_k = _place(TILES, CU_Q, CU_K, tile0 + chunk_row // BM)
    m = first + chunk_row % BM + tl.arange(0, ROWS)
    row = m < n_q
    own = (n_k - n_q + m) // S
    j = tl.arange(0, WIDTH)
    there = row[:, None] & (j[None, :] <= own[:, None])
    if EVERYTHING:
        chosen = there
    else:
        rows = (g * (tl.num_programs(0) * ROWS) + chunk_row).to(tl.int64) + tl.arange(0, ROWS)
        before = row[:, None] & (j[None, :] < own[:, None])
        x = tl.load(IMPORTANCE + rows[:, None] * n_blocks + j[None, :], mask=before, other=0.0)
        key = x.to(tl.int32, bitcast=True)
        key = tl.where((j[None, :] == 0) | (j[None, :] >= own[:, None] - 1), 0x7F800000, key)  # forced: infinity
        key = tl.where(there, key, -1)
        low = tl.zeros((ROWS,), tl.int32)  # at least COUNT keys are >= low, unless there are fewer in all
        high = tl.max(key, 1) + 1  # fewer than COUNT, or exactly as many as needed, are >= high
        n_low = tl.sum((key >= 0).to(tl.int32), 1)
        while tl.max(((n_low > COUNT) & (high - low > 1)).to(tl.int32), 0) > 0:
            middle = low + (high - low) // 2
            n_middle = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
            enough = n_middle >= COUNT
            low = tl.where(enough, middle, low)
            n_low = tl.where(enough, n_middle, n_low)
            high = tl.where(enough, high, middle)
        above = key >= high[:, None]
        equal = (key >= low[:, None]) & (key < high[:, None])
        left = COUNT - tl.sum(above.to(tl.int32), 1)
        chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))
    out = BLOCKS + ((g * n + q0 + m).to(tl.int64) * COUNT)[:, None]
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(out + slot, tl.broadcast_to(j[None, :], (ROWS, WIDTH)), mask=chosen)
    number = tl.sum(chosen.to(tl.int32), 1)
    s = tl.arange(0, COUNT_P2)
    empty = row[:, None] & (s[None, :] >= number[:, None]) & (s < COUNT)[None, :]
    tl.store(out + s[None, :], tl.full((ROWS, COUNT_P2), -1, tl.int32), mask=empty)


@_jit
def _union_kernel(
    BLOCKS, UNION, BITS, SIZES, TILES, CU_Q, CU_K, n,
    S: tl.constexpr, COUNT: tl.constexpr, COUNT_P2: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The union of the blocks that a tile's queries chose.

    UNION [G, tiles, entries]: block indices, ascending; BITS: running sums (mod 2³²) of the sets of queries that chose
    each, a bit per query; SIZES [G, tiles, 2]: number of blocks, and of those that every query has behind it.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    sample, first, q0, k0, n_q, n_k = _place(TILES, CU_Q, CU_K, tile)
    E: tl.constexpr = BQ * COUNT_P2
    e = tl.arange(0, E)
    m = first + e // COUNT_P2
    slot = e % COUNT_P2
    there = (m < n_q) & (slot < COUNT)
    block = tl.load(BLOCKS + (g * n + q0 + m).to(tl.int64) * COUNT + slot, mask=there, other=-1)
    key = tl.sort(tl.where(block >= 0, block * BQ + e // COUNT_P2, 0x7FFFFFFF))
    valid = key != 0x7FFFFFFF
    block = key // BQ
    before = tl.gather(key, tl.maximum(e - 1, 0), 0)
    after = tl.gather(key, tl.minimum(e + 1, E - 1), 0)
    new = valid & ((e == 0) | (block != before // BQ))
    last = valid & ((e == E - 1) | (block != after // BQ))
    again = (e > 0) & (key == before)
    at = (g * tl.num_programs(0) + tile).to(tl.int64)
    position = tl.cumsum(new.to(tl.int32), 0) - 1
    bits = tl.cumsum(tl.where(valid & (again == 0), 1 << (key % BQ), 0), 0)
    tl.store(UNION + at * E + position, block, mask=new)
    tl.store(BITS + at * E + position, bits, mask=last)
    behind = new & (block < (n_k - n_q + first + 1) // S)
    tl.store(SIZES + 2 * at, tl.sum(new.to(tl.int32), 0))
    tl.store(SIZES + 2 * at + 1, tl.sum(behind.to(tl.int32), 0))


@_jit
def _selected_kernel(
    Q, K, V, OUT, LSE, UNION_, BITS, SIZES, TILES, CU_Q, CU_K, GATES, O_CMP, O_WIN, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    BQ: tl.constexpr, UNION: tl.constexpr, HEADS_P2: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile over the union of its blocks: rows are its queries times the heads of a group, and a row
    takes part in the blocks that its query chose. GATED: OUT is the gated sum with the other branches."""
    tile = tl.program_id(0)
    g = tl.program_id(1)
    sample, first, q0, k0, n_q, n_k = _place(TILES, CU_Q, CU_K, tile)
    if first < n_q:
        r = tl.arange(0, BQ * HEADS_P2)
        m = first + r // HEADS_P2
        row = (m < n_q) & (r % HEADS_P2 < H // G)
        i = n_k - n_q + m
        head = (q0 + m).to(tl.int64) * H + g * (H // G) + r % HEADS_P2
        q = _load(Q, head * D, row, D, D_P2, True)
        acc = tl.zeros((BQ * HEADS_P2, D_P2), tl.float32)
        top = tl.full((BQ * HEADS_P2,), -1e30, tl.float32)
        total = tl.zeros((BQ * HEADS_P2,), tl.float32)
        j = tl.arange(0, BN)
        at = (g * tl.num_programs(0) + tile).to(tl.int64)
        size = tl.load(SIZES + 2 * at)
        behind = tl.load(SIZES + 2 * at + 1)
        at = at * UNION
        PARTS: tl.constexpr = S // BN
        # Two loops rather than one with a mask; the second is a loop, too, because two dots of straight-line code
        # after a pipelined loop make ptxas serialise every wgmma of the kernel.
        for part in range(behind * PARTS):
            entry = part // PARTS
            key = tl.load(UNION_ + at + entry) * S + part % PARTS * BN + j
            bits = tl.load(BITS + at + entry) - tl.load(BITS + at + entry - 1, mask=entry > 0, other=0)
            where = ((k0 + key).to(tl.int64) * G + g) * D
            x = tl.dot(q, tl.trans(_load(K, where, row, D, D_P2, False)), input_precision=PRECISION)
            v = _load(V, where, row, D, D_P2, False)
            on = ((bits >> (r // HEADS_P2)) & 1) != 0
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, on, PRECISION)
        for part in range(behind * PARTS, size * PARTS):
            entry = part // PARTS
            key = tl.load(UNION_ + at + entry) * S + part % PARTS * BN + j
            bits = tl.load(BITS + at + entry) - tl.load(BITS + at + entry - 1, mask=entry > 0, other=0)
            where = ((k0 + key).to(tl.int64) * G + g) * D
            x = tl.dot(q, tl.trans(_load(K, where, key < n_k, D, D_P2, True)), input_precision=PRECISION)
            x = tl.where(key[None, :] <= i[:, None], x, float("-inf"))
            v = _load(V, where, key < n_k, D, D_P2, True)
            on = ((bits >> (r // HEADS_P2)) & 1) != 0
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, on, PRECISION)
        o, lse = _finish(acc, top, total)
        if GATED:
            o = o * tl.load(GATES + head * 3 + 1, mask=row, other=0.0).to(tl.float32)[:, None]
            g_cmp = tl.load(GATES + head * 3, mask=row, other=0.0).to(tl.float32)
            o += g_cmp[:, None] * _load(O_CMP, head * D, row, D, D_P2, True).to(tl.float32)
            g_win = tl.load(GATES + head * 3 + 2, mask=row, other=0.0).to(tl.float32)
            o += g_win[:, None] * _load(O_WIN, head * D, row, D, D_P2, True).to(tl.float32)
        _store(OUT, head * D, row, o, D, D_P2)
        tl.store(LSE + head, lse, mask=row)


@_jit
def _window_kernel(
    Q, K, V, OUT, LSE, TILES, CU_Q, CU_K, scale, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one head of a tile over the last `window` keys of each query."""
    tile = tl.program_id(0)
    h = tl.program_id(1)
    sample, first, q0, k0, n_q, n_k = _place(TILES, CU_Q, CU_K, tile)
    if first < n_q:
        g = h // (H // G)
        m = first + tl.arange(0, BM)
        row = m < n_q
        i = n_k - n_q + m
        at = ((q0 + m).to(tl.int64) * H + h) * D
        q = _load(Q, at, row, D, D_P2, True)
        acc = tl.zeros((BM, D_P2), tl.float32)
        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for start in range(tl.maximum(n_k - n_q + first - window + 1, 0), n_k - n_q + tl.minimum(first + BM, n_q), BN):
            key = start + tl.arange(0, BN)
            where = ((k0 + key).to(tl.int64) * G + g) * D
            x = tl.dot(q, tl.trans(_load(K, where, key < n_k, D, D_P2, True)), input_precision=PRECISION)
            x = tl.where((key[None, :] <= i[:, None]) & (key[None, :] > (i - window)[:, None]), x, float("-inf"))
            v = _load(V, where, key < n_k, D, D_P2, True)
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, row, PRECISION)
        o, lse = _finish(acc, top, total)
        _store(OUT, at, row, o, D, D_P2)
        tl.store(LSE + (q0 + m).to(tl.int64) * H + h, lse, mask=row)
