"""Device code of `nsa_triton.py`: the helpers of both passes and the kernels of the forward pass.

The kernels of the backward pass are in `nsa_kernels_backward.py`; `nsa_launches.py` launches them all.

A *tile* is a run of adjacent queries of one sample. Compression and window attend to a *band* of keys, head by head:
the rows of a matrix product are queries. So does the selection if all blocks are chosen. Else it takes all heads of a
KV head at once, since they share the chosen blocks: its rows are queries times heads, its columns the *union* of the
blocks that the tile's queries chose. A block is read once for all of them; rows whose query did not choose it do not
take part in that turn.

                          blocks of the union
                      0     3     8     9     15    16
    query 0, head 0   ██    ██                ██    ▙
             head 1   ██    ██                ██    ▙        ██  chosen, and seen whole
    query 1, head 0   ██    ██    ██          ██    █▙       ▙   its own: keys after the query are masked
             head 1   ██    ██    ██          ██    █▙
    query 2, head 0   ██                ██    ██    ██▙
             head 1   ██                ██    ██    ██▙
                      └─ first loop: no mask ───┘   └ second loop: mask

Names, beside those of `nsa_torch.py` (N queries and M keys of all samples, H query heads, G KV heads, D channels):

    S           tokens per block; in a band, tokens that a key stands for: 1, or a block's if keys are block means
    BM, BN      of a turn of a loop: queries (of importance: of a tile), and keys
    BQ, HEADS   of a tile of the selection: queries, and heads per query
    ROWS        rows of a tile: BQ * HEADS, or more, so that it is a power of 2
    PARTS       turns per block, S // BN
    COUNT       chosen blocks per query
    ROOM        blocks of a union, at most: BQ * COUNT
    *_P2        the next power of 2: sizes of `tl.arange`
    B           samples; CU_Q and CU_K [B + 1] say where each starts in N and M
    first, q0, k0, block0, n_q, n_k     see `place`
    m, i        queries of a tile: their indices among those of their sample, and in its stream of keys
    j, key      keys of a turn: their number in the turn, and their index in the sample
    at          offsets of rows
    valid       which rows stand for a query
    keep        which keys a row sees
    on          which rows take part in a turn
    acc, peak, total    of an online softmax: weighted sum of values, largest logit so far, sum of weights
    scale       the factor of logits, times log2 e: exponentials are those of base 2

`Launches.launch` gives every kernel those of CU_Q, CU_K, B, B_P2, H, G, D, D_P2, scale and PRECISION that it has.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # importing this file must not fail: `nsa_triton.available` then says no
    triton = None

    class tl:
        constexpr = float


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a first peak: differences to -inf would not be numbers
INFINITY = tl.constexpr(0x7F800000)  # the bits of the fp32
NO_KEY = tl.constexpr(0x7FFFFFFF)  # sorts last


# Numbers that change from call to call. Triton would compile a kernel again where one is 1, or a multiple of 16.
NUMBERS = ("B", "n", "n_rows", "n_keys", "n_means", "window", "splits", "tile0", "g0", "blocks")
# Views whose start is a multiple of 16 bytes at some lengths only.
VIEWS = ("LSE", "OTHERS", "OWN", "BITS")


def jit(function):
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VIEWS)


@jit
def load(pointer, at, keep, D: tl.constexpr, D_P2: tl.constexpr, MASK: tl.constexpr):
    """Rows [n, D_P2] at the offsets `at` [n]; 0 beyond D and, if MASK, where `keep` [n] is false."""
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


@jit
def store(pointer, at, keep, x, D: tl.constexpr, D_P2: tl.constexpr):
    d = tl.arange(0, D_P2)
    tl.store(pointer + at[:, None] + d[None, :], x.to(pointer.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@jit
def place(tile, CU_Q, CU_K, B, SIZE: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, B_P2: tl.constexpr):
    """Where a tile stands that holds SIZE queries, or SIZE runs of UNIT keys if UNIT is not 0.

    Returns the first of them within the sample; the sample's first query, first key and first block of S; its number
    of queries and of keys. For a surplus tile both numbers are 0, so that the first is beyond them.
    """
    b = tl.arange(0, B_P2)
    q0 = tl.load(CU_Q + b, mask=b < B, other=0)
    n_q = tl.load(CU_Q + b + 1, mask=b < B, other=0) - q0
    k0 = tl.load(CU_K + b, mask=b < B, other=0)
    n_k = tl.load(CU_K + b + 1, mask=b < B, other=0) - k0

    tiles = (n_q + SIZE - 1) // SIZE
    if UNIT > 0:
        tiles = (n_k // UNIT + SIZE - 1) // SIZE
    end = tl.cumsum(tiles, 0)
    here = (end > tile) & (end - tiles <= tile)  # only in the tile's sample

    first = (tile - tl.sum(tl.where(here, end - tiles, 0), 0)) * SIZE
    block0 = tl.sum(tl.where(end <= tile, n_k // S, 0), 0)
    q0 = tl.sum(tl.where(here, q0, 0), 0)
    k0 = tl.sum(tl.where(here, k0, 0), 0)
    return first, q0, k0, block0, tl.sum(tl.where(here, n_q, 0), 0), tl.sum(tl.where(here, n_k, 0), 0)


@jit
def softmax_step(
    acc, peak, total, x, v, keep, scale, on,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A turn of an online softmax: products x [R, n] of queries and keys, and the keys' values v [n, D].

    If MASK, only where `keep` [R, n] is true. Rows where `on` [R] is false do not take part: their peak is +inf here,
    which costs less than a mask.
    """
    if MASK:
        x = tl.where(keep, x, float("-inf"))
    new_peak = tl.where(on, tl.maximum(peak, tl.max(x, 1) * scale), peak)
    p = tl.math.exp2(x * scale - tl.where(on, new_peak, float("inf"))[:, None])
    shrunk = tl.math.exp2(peak - new_peak)
    acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION)
    return acc, new_peak, total * shrunk + tl.sum(p, 1)


@jit
def attend_step(
    acc, peak, total, q, k, v, keep, scale, on,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`softmax_step` of queries q [R, D] over keys k [n, D]."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return softmax_step(acc, peak, total, x, v, keep, scale, on, MASK, PRECISION)


@jit
def finish(acc, peak, total):
    """o [R, D] and the natural log-sum-exp [R] of an online softmax; 0 and -inf where there was no key."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, (peak + tl.math.log2(total)) * LN_2, float("-inf"))


@jit
def store_share(OUT, KEPT, GATES, at, valid, o, D: tl.constexpr, D_P2: tl.constexpr, BRANCH: tl.constexpr):
    """Store o [R, D] at the rows `at` of [N, H]: to KEPT, if that is given, and to OUT. With GATES [N, H, 3], OUT gets
    its share of the gated sum instead, added to the shares of branches of lower number."""
    if KEPT is not None:
        store(KEPT, at * D, valid, o, D, D_P2)
    if GATES is not None:
        o *= tl.load(GATES + at * 3 + BRANCH, mask=valid, other=0.0).to(tl.float32)[:, None]
        if BRANCH > 0:
            o += load(OUT, at * D, valid, D, D_P2, True).to(tl.float32)
    store(OUT, at * D, valid, o, D, D_P2)


@jit
def means_kernel(
    K, V, K_MEANS, V_MEANS, CU_Q, CU_K, B,
    G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    """Means of a complete block of k and v, or with VARIANCE the variance of v: K_MEANS, V_MEANS [blocks, G, D]."""
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = place(tl.program_id(0), CU_Q, CU_K, B, S, 1, S, B_P2)
    if first + S <= n_k:
        at = ((k0 + first + tl.arange(0, S)).to(tl.int64) * G + g) * D
        d = tl.arange(0, D_P2)
        out = ((block0 + first // S).to(tl.int64) * G + g) * D + d

        k = tl.sum(load(K, at, at >= 0, D, D_P2, False).to(tl.float32), 0) / S
        tl.store(K_MEANS + out, k.to(K_MEANS.dtype.element_ty), mask=d < D)

        x = load(V, at, at >= 0, D, D_P2, False).to(tl.float32)
        v = tl.sum(x, 0) / S
        if VARIANCE:
            x -= v[None, :]
            v = tl.sum(x * x, 0) / S
        tl.store(V_MEANS + out, v.to(V_MEANS.dtype.element_ty), mask=d < D)


# Bands.


@jit
def token(start, index, n, REVERSE: tl.constexpr):
    """Where a query or key of this index stands among all, of the n of a sample that begin at `start`."""
    if REVERSE:
        index = n - 1 - index
    return (start + index).to(tl.int64)


@jit
def seen_keys(SEEN, q0, m, n_q, n_k, S: tl.constexpr):
    """How many keys queries m of a sample see, from its first key on."""
    if SEEN is None:  # noqa: SIM108 (decided when compiling)
        seen = (n_k - n_q + m + 1) // S
    else:
        seen = tl.load(SEEN + q0 + m, mask=m < n_q, other=0)
    return seen


@jit
def is_skipped(SKIPPED, at, valid, key, WORDS: tl.constexpr):
    """Whether the bits of keys are set in rows `at` of SKIPPED [N, G, WORDS]; at, valid (whether there is such a row)
    and key are 2D, to be broadcast."""
    word = tl.load(SKIPPED + at * WORDS + key // 32, mask=valid & (key < 32 * WORDS), other=0)
    return ((word >> (key % 32)) & 1) != 0


@jit
def in_band(key, seen, window, SKIPPED, at, valid, WORDS: tl.constexpr):
    """Whether a query sees a key: one of the last `window` of the first `seen`, and not skipped. All are 2D."""
    keep = (key < seen) & (key >= seen - window)
    if SKIPPED is not None:
        keep = keep & ~is_skipped(SKIPPED, at, valid, key, WORDS)
    return keep


@jit
def band_kernel(
    Q, K, V, OUT, LSE, GATES, KEPT, SEEN, SKIPPED, window, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr, REVERSE: tl.constexpr, BRANCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attention of one head of a tile over a band of keys: the last `window` of those that end at or before the query.

    A key stands for S tokens: a block mean (all of them are in the window) or, with S = 1, a token. With SEEN [N], the
    query sees as many of the sample's first keys as that says, wherever it stands itself. With SKIPPED [N, G, WORDS],
    keys whose bits are set are left out. With REVERSE, queries and keys are counted from their ends, so that a query
    sees what comes after it.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    h = tl.program_id(1)
    g = h // (H // G)
    first, q0, k0, key0, n_q, n_k = place(tile, CU_Q, CU_K, B, BM, 0, S, B_P2)
    if first < n_q:
        m = first + tl.arange(0, BM)
        valid = m < n_q
        seen = seen_keys(SEEN, q0, m, n_q, n_k, S)
        at_q = token(q0, m, n_q, REVERSE) * H + h
        at_skipped = ((q0 + m).to(tl.int64) * G + g)[:, None]
        q = load(Q, at_q * D, valid, D, D_P2, True)

        acc = tl.zeros((BM, D_P2), tl.float32)
        peak = tl.full((BM,), LOWEST, tl.float32)
        total = tl.zeros((BM,), tl.float32)

        # Up to `free`, every row sees every key.
        by_first = seen_keys(SEEN, q0, first, n_q, n_k, S)
        by_last = seen_keys(SEEN, q0, tl.minimum(first + BM, n_q) - 1, n_q, n_k, S)
        low = tl.maximum(by_first - window, 0)
        free = tl.where(by_last <= window, by_first // BN * BN, low)
        j = tl.arange(0, BN)
        for start in range(low, free, BN):
            at = (token(key0, start + j, n_k // S, REVERSE) * G + g) * D
            k = load(K, at, valid, D, D_P2, False)
            v = load(V, at, valid, D, D_P2, False)
            keep = valid[:, None]
            if SKIPPED is not None:
                keep = ~is_skipped(SKIPPED, at_skipped, valid[:, None], (start + j)[None, :], WORDS)
            acc, peak, total = attend_step(
                acc, peak, total, q, k, v, keep, scale, valid, SKIPPED is not None, PRECISION
            )
        for start in range(free, by_last, BN):
            at = (token(key0, start + j, n_k // S, REVERSE) * G + g) * D
            there = start + j < by_last
            k = load(K, at, there, D, D_P2, True)
            v = load(V, at, there, D, D_P2, True)
            key = (start + j)[None, :]
            keep = in_band(key, seen[:, None], window, SKIPPED, at_skipped, valid[:, None], WORDS)
            acc, peak, total = attend_step(acc, peak, total, q, k, v, keep, scale, valid, True, PRECISION)

        o, lse = finish(acc, peak, total)
        tl.store(LSE + at_q, lse, mask=valid)
        store_share(OUT, KEPT, GATES, at_q, valid, o, D, D_P2, BRANCH)


# The choice of blocks.


@jit
def block_scores(
    q, k, at, there, VARIANCES, deviations, scale,
    D: tl.constexpr, D_P2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of blocks for queries q [R, D], in units of log 2: products with their means k [n, D], or, with the
    variances at `at` [n], the log-sum-exp that `nsa_torch.block_lse` estimates from both."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if VARIANCES is not None:
        variance = load(VARIANCES, at, there, D, D_P2, True)
        q = q.to(tl.float32)
        variance = tl.dot((q * q).to(variance.dtype), tl.trans(variance), input_precision=PRECISION) * (scale * scale)
        limit = deviations * LOG2_E
        wide = deviations * tl.sqrt(variance)
        x += tl.where(variance < limit * limit, (variance + limit * limit) * (0.5 * LN_2), wide)
    return x


@jit
def estimate_kernel(
    Q, K_MEANS, VARIANCES, deviations, OTHERS, LSE, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """LSE [N, H]: the natural log-sum-exp of one head of a tile over OTHERS [N, H] and the blocks before its own."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    h = tl.program_id(1)
    g = h // (H // G)
    first, q0, k0, block0, n_q, n_k = place(tile, CU_Q, CU_K, B, BM, 0, S, B_P2)
    if first < n_q:
        m = first + tl.arange(0, BM)
        valid = m < n_q
        own = (n_k - n_q + m) // S
        last = (n_k - n_q + tl.minimum(first + BM, n_q) - 1) // S
        at_q = (q0 + m).to(tl.int64) * H + h
        q = load(Q, at_q * D, valid, D, D_P2, True)

        peak = tl.load(OTHERS + at_q, mask=valid, other=0.0) * LOG2_E
        total = tl.where(peak > float("-inf"), 1.0, 0.0)
        peak = tl.maximum(peak, LOWEST)
        j = tl.arange(0, BN)
        for start in range(0, last, BN):
            there = start + j < last
            at = ((block0 + start + j).to(tl.int64) * G + g) * D
            k = load(K_MEANS, at, there, D, D_P2, True)
            x = block_scores(q, k, at, there, VARIANCES, deviations, scale, D, D_P2, PRECISION)
            x = tl.where((start + j)[None, :] < own[:, None], x, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(x, 1))
            total = total * tl.math.exp2(peak - new_peak) + tl.sum(tl.math.exp2(x - new_peak[:, None]), 1)
            peak = new_peak
        tl.store(LSE + at_q, (peak + tl.math.log2(tl.maximum(total, 1.0))) * LN_2, mask=valid)


@jit
def importance_kernel(
    Q, K_MEANS, VARIANCES, deviations, LSE, IMPORTANCE, tile0, stride, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """IMPORTANCE [G, queries of the chunk, stride]: probabilities of BN blocks for a tile's queries, by `block_scores`
    and LSE [N, H], summed over the heads of a KV head. The chunk begins with tile `tile0`."""
    start = tl.program_id(0) * BN
    tile = tl.program_id(1)
    g = tl.program_id(2)
    first, q0, k0, block0, n_q, n_k = place(tile0 + tile, CU_Q, CU_K, B, BM, 0, S, B_P2)
    own = (n_k - n_q + tl.minimum(first + BM, n_q) - 1) // S  # of the last query
    if (first < n_q) & (start < own):
        m = first + tl.arange(0, BM)
        valid = m < n_q
        j = start + tl.arange(0, BN)
        at = ((block0 + j).to(tl.int64) * G + g) * D
        k = load(K_MEANS, at, j < own, D, D_P2, True)

        # One head after another, so that nothing is summed across rows.
        importance = tl.zeros((BM, BN), tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            at_q = (q0 + m).to(tl.int64) * H + h
            q = load(Q, at_q * D, valid, D, D_P2, True)
            lse = tl.load(LSE + at_q, mask=valid, other=0.0) * LOG2_E
            x = block_scores(q, k, at, j < own, VARIANCES, deviations, scale, D, D_P2, PRECISION)
            importance += tl.math.exp2(x - lse[:, None])

        out = (g * tl.num_programs(1) + tile).to(tl.int64) * BM + tl.arange(0, BM)
        where = IMPORTANCE + out[:, None] * stride + j[None, :]
        tl.store(where, importance, mask=valid[:, None] & (j < stride)[None, :])


@jit
def largest(key, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Which COUNT of the integers of each row are the largest; of equal ones those that come first. -1 stands for none.

    By bisection: `low` is a value that at least COUNT keys reach, unless there are fewer in all; fewer than COUNT, or
    exactly as many, reach `high`. Between them are keys of one value, after at most 31 steps.
    """
    low = tl.zeros((ROWS,), tl.int32)
    high = tl.max(key, 1) + 1
    n_low = tl.sum((key >= 0).to(tl.int32), 1)
    while tl.max(((high - low > 1) & (n_low > COUNT)).to(tl.int32), 0) > 0:
        middle = low + (high - low) // 2
        n_middle = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        enough = n_middle >= COUNT
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        high = tl.where(enough, high, middle)

    above = key >= high[:, None]
    equal = (key >= low[:, None]) & (key < high[:, None])
    left = COUNT - tl.sum(above.to(tl.int32), 1)
    rank = tl.cumsum(equal.to(tl.int32), 1)
    return above | (equal & (rank <= left[:, None]))


@jit
def top_kernel(
    IMPORTANCE, OWN, BLOCKS, tile0, stride, n, window, CU_Q, CU_K, B,
    G: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, COUNT: tl.constexpr, COUNT_P2: tl.constexpr, BM: tl.constexpr,
    EVERYTHING: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCKS [G, n, COUNT]: the COUNT most important blocks of ROWS queries, ascending, -1 padded.

    Block 0 and those that the last `window` tokens overlap are always chosen, unless OWN [G, n] has the importance of
    a query's own block. With EVERYTHING, no query has more than COUNT blocks, and IMPORTANCE is not read.
    """
    chunk_row = tl.program_id(0) * ROWS
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = place(tile0 + chunk_row // BM, CU_Q, CU_K, B, BM, 0, S, B_P2)
    m = first + chunk_row % BM + tl.arange(0, ROWS)
    valid = m < n_q
    own = (n_k - n_q + m) // S
    j = tl.arange(0, WIDTH)
    there = valid[:, None] & (j[None, :] <= own[:, None])
    if EVERYTHING:
        chosen = there
    else:
        at = (g * (tl.num_programs(0) * ROWS) + chunk_row).to(tl.int64) + tl.arange(0, ROWS)
        before = valid[:, None] & (j[None, :] < own[:, None])
        x = tl.load(IMPORTANCE + at[:, None] * stride + j[None, :], mask=before, other=0.0)

        # Floats that are not negative order as their bits do. A NaN would order anyhow, and COUNT be exceeded.
        x = tl.where(x >= 0.0, x, 0.0)
        key = tl.minimum(x.to(tl.int32, bitcast=True), INFINITY)
        if OWN is None:
            always = (j[None, :] == 0) | (j[None, :] >= ((n_k - n_q + m + 1 - window) // S)[:, None])
            key = tl.where(always, INFINITY, key)
        else:
            mine = tl.load(OWN + (g * n + q0 + m).to(tl.int64), mask=valid, other=0.0).to(tl.int32, bitcast=True)
            key = tl.where(j[None, :] == own[:, None], mine[:, None], key)
        chosen = largest(tl.where(there, key, -1), COUNT, ROWS)

    out = BLOCKS + ((g * n + q0 + m).to(tl.int64) * COUNT)[:, None]
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(out + slot, tl.broadcast_to(j[None, :], (ROWS, WIDTH)), mask=chosen)

    number = tl.sum(chosen.to(tl.int32), 1)
    slot = tl.arange(0, COUNT_P2)[None, :]
    empty = valid[:, None] & (slot >= number[:, None]) & (slot < COUNT)
    tl.store(out + slot, tl.full((ROWS, COUNT_P2), -1, tl.int32), mask=empty)


# The selection.


@jit
def union_kernel(
    BLOCKS, UNION, BITS, SIZES, n, CU_Q, CU_K, B,
    G: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, COUNT: tl.constexpr,
    ROOM: tl.constexpr, ROOM_P2: tl.constexpr,
):  # fmt: skip
    """The union of the blocks that a tile's queries chose, BLOCKS [G, n, COUNT].

    UNION [G, tiles, ROOM]: block indices, ascending; BITS: running sums (mod 2³²) of the sets of queries that chose
    each, a bit per query; SIZES [G, tiles, 2]: number of blocks, and of those that every query has behind it.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = place(tile, CU_Q, CU_K, B, BQ, 0, S, B_P2)
    entry = tl.arange(0, ROOM_P2)
    m = first + entry // COUNT
    there = (m < n_q) & (entry < ROOM)
    block = tl.load(BLOCKS + (g * n + q0 + first).to(tl.int64) * COUNT + entry, mask=there, other=-1)
    block = tl.where(block <= (n_k - n_q + m) // S, block, -1)  # of blocks given, some may be beyond the query's own

    # Sorted by block, then by query.
    key = tl.sort(tl.where(block >= 0, block * BQ + entry // COUNT, NO_KEY))
    valid = key != NO_KEY
    block = key // BQ
    before = tl.gather(key, tl.maximum(entry - 1, 0), 0)
    after = tl.gather(key, tl.minimum(entry + 1, ROOM_P2 - 1), 0)
    new = valid & ((entry == 0) | (block != before // BQ))
    last = valid & ((entry == ROOM_P2 - 1) | (block != after // BQ))
    again = (entry > 0) & (key == before)  # a block given twice

    at = (g * tl.num_programs(0) + tile).to(tl.int64)
    position = tl.cumsum(new.to(tl.int32), 0) - 1
    bits = tl.cumsum(tl.where(valid & (again == 0), 1 << (key % BQ), 0), 0)
    tl.store(UNION + at * ROOM + position, block, mask=new)
    tl.store(BITS + at * ROOM + position, bits, mask=last)

    behind = new & (block < (n_k - n_q + first + 1) // S)
    tl.store(SIZES + 2 * at, tl.sum(new.to(tl.int32), 0))
    tl.store(SIZES + 2 * at + 1, tl.sum(behind.to(tl.int32), 0))


@jit
def selection_rows(
    first, q0, n_q, g,
    H: tl.constexpr, G: tl.constexpr, BQ: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the rows of a tile: the query, whether there is such a row, and which it is of [N, H]."""
    r = tl.arange(0, ROWS)
    m = first + tl.minimum(r // HEADS, BQ - 1)
    head = r % HEADS
    valid = (r < BQ * HEADS) & (m < n_q) & (head < H // G)
    return m, valid, (q0 + m).to(tl.int64) * H + g * (H // G) + head


@jit
def union_part(UNION, BITS, at, part, size, query, S: tl.constexpr, PARTS: tl.constexpr):
    """First key of a part of a tile's union of `size` blocks, and which rows, of the queries `query` of the tile, chose
    its block. Beyond the end: key 0, and no row."""
    entry = at + part // PARTS
    there = part < size * PARTS
    bits = tl.load(BITS + entry, mask=there, other=0) - tl.load(BITS + entry - 1, mask=there & (part >= PARTS), other=0)
    block = tl.load(UNION + entry, mask=there, other=0)
    return block * S + part % PARTS * (S // PARTS), ((bits >> query) & 1) != 0


@jit
def key_products(
    q, K, k0, key, n_k, g,
    G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of q [R, D] with the keys `key` [n] of a sample."""
    k = load(K, ((k0 + key).to(tl.int64) * G + g) * D, key < n_k, D, D_P2, True)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@jit
def selected_kernel(
    Q, K, V, OUT, LSE, GATES, KEPT, UNION, BITS, SIZES, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Attention of a tile over the union of its blocks.

    Turns are pipelined by hand: products with keys are computed a turn before their softmax, so that they run beside
    exponentials, and where keys stand is known a turn before they are loaded. The compiler would load a block's index
    and its keys in the same turn, and by waiting for the index wait for all keys under way.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = place(tile, CU_Q, CU_K, B, BQ, 0, S, B_P2)
    if first < n_q:
        m, valid, at_q = selection_rows(first, q0, n_q, g, H, G, BQ, HEADS, ROWS)
        i = n_k - n_q + m
        q = load(Q, at_q * D, valid, D, D_P2, True)

        acc = tl.zeros((ROWS, D_P2), tl.float32)
        peak = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)

        j = tl.arange(0, BN)
        PARTS: tl.constexpr = S // BN
        at = (g * tl.num_programs(0) + tile).to(tl.int64)
        size = tl.load(SIZES + 2 * at)
        behind = tl.load(SIZES + 2 * at + 1)
        at = at * ROOM
        key, on = union_part(UNION, BITS, at, 0, size, m - first, S, PARTS)
        next_key, _ = union_part(UNION, BITS, at, 1, size, m - first, S, PARTS)
        x = key_products(q, K, k0, key + j, n_k, g, G, D, D_P2, PRECISION)

        # Two loops rather than one with a mask; the second is a loop, too, because two dots of straight-line code
        # after a pipelined loop make ptxas serialise every wgmma of the kernel.
        for part in range(behind * PARTS):
            next_x = key_products(q, K, k0, next_key + j, n_k, g, G, D, D_P2, PRECISION)
            v = load(V, ((k0 + key + j).to(tl.int64) * G + g) * D, valid, D, D_P2, False)
            acc, peak, total = softmax_step(acc, peak, total, x, v, on, scale, on, False, PRECISION)
            x = next_x
            key, on = union_part(UNION, BITS, at, part + 1, size, m - first, S, PARTS)
            next_key, _ = union_part(UNION, BITS, at, part + 2, size, m - first, S, PARTS)
        for part in range(behind * PARTS, size * PARTS):
            next_x = key_products(q, K, k0, next_key + j, n_k, g, G, D, D_P2, PRECISION)
            v = load(V, ((k0 + key + j).to(tl.int64) * G + g) * D, key + j < n_k, D, D_P2, True)
            keep = (key + j)[None, :] <= i[:, None]
            acc, peak, total = softmax_step(acc, peak, total, x, v, keep, scale, on, True, PRECISION)
            x = next_x
            key, on = union_part(UNION, BITS, at, part + 1, size, m - first, S, PARTS)
            next_key, _ = union_part(UNION, BITS, at, part + 2, size, m - first, S, PARTS)

        o, lse = finish(acc, peak, total)
        tl.store(LSE + at_q, lse, mask=valid)
        store_share(OUT, KEPT, GATES, at_q, valid, o, D, D_P2, BRANCH)
