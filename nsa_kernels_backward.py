"""Device code of `nsa_triton.py`: the kernels of the backward pass. `nsa_kernels.py` explains tiles and names.

The probability of a key is computed again from the branch's log-sum-exp. With p for it, gate for the branch's gate and
d_out for the gradient of the gated sum, the gradient of a logit is gate * p * (d_out · v - d_out · o), that of v
gate * p * d_out. DOTS holds d_out · o, from which the gradient of the log-sum-exp is subtracted, if it has one.

Gradients of keys and values are sums over all queries that see them. No two programs add to one of them: they are first
written as partial sums, [splits of the queries, keys] of a band and [pieces, S] of the selection, where a *piece* is at
most LIST queries of the list of those that chose a block. `collect_kernel` then adds these up in order.
"""

from .nsa_kernels import (
    LN_2,
    LOG2_E,
    in_band,
    jit,
    load,
    place,
    seen_keys,
    selection_rows,
    store,
    tl,
    token,
    union_part,
)


@jit
def dots_kernel(
    D_OUT, OUTPUTS, DOTS, n_rows,
    D: tl.constexpr, D_P2: tl.constexpr, BRANCHES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DOTS [rows, BRANCHES]: d_out · o of each branch; OUTPUTS [BRANCHES, rows, D]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = r.to(tl.int64)
    do = load(D_OUT, at * D, r < n_rows, D, D_P2, True).to(tl.float32)
    for branch in tl.static_range(BRANCHES):
        o = load(OUTPUTS, (at + branch * tl.cast(n_rows, tl.int64)) * D, r < n_rows, D, D_P2, True).to(tl.float32)
        tl.store(DOTS + at * BRANCHES + branch, tl.sum(do * o, 1), mask=r < n_rows)


@jit
def gradient_rows(
    Q, D_OUT, LSE, GATES, DOTS, base, at, valid,
    D: tl.constexpr, D_P2: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Of the rows `base` + `at` [R] of [N, H]: q, d_out, lse in units of log 2 (infinite where there is no row or key,
    so that probabilities are 0), gate, and d_out · o."""
    q = load(Q + base * D, at * D, valid, D, D_P2, True)
    do = load(D_OUT + base * D, at * D, valid, D, D_P2, True)

    lse = tl.load(LSE + base + at, mask=valid, other=float("-inf")) * LOG2_E
    lse = tl.where(lse > float("-inf"), lse, float("inf"))

    of_branch = base * BRANCHES + BRANCH
    gate = valid.to(tl.float32)
    if GATES is not None:
        gate = tl.load(GATES + of_branch + at * BRANCHES, mask=valid, other=0.0).to(tl.float32)
    dot = tl.load(DOTS + of_branch + at * BRANCHES, mask=valid, other=0.0)
    return q, do, lse, gate, dot


# Gradients of queries.


@jit
def dq_step(
    dq, q, do, k, v, keep, scale, lse, dot,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq [R, D] the gradient of q through keys k, v [n, D], before gate and scale; keep [R, n], if MASK."""
    p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASK:
        p = tl.where(keep, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - dot[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@jit
def store_dq(DQ, at, valid, dq, gate, scale, D: tl.constexpr, D_P2: tl.constexpr, ADD: tl.constexpr):
    """Store dq, or with ADD add it to what is there."""
    dq *= (gate * (scale * LN_2))[:, None]
    if ADD:
        dq += load(DQ, at * D, valid, D, D_P2, True).to(tl.float32)
    store(DQ, at * D, valid, dq, D, D_P2)


@jit
def band_dq_kernel(
    Q, K, V, DQ, D_OUT, LSE, GATES, DOTS, SEEN, SKIPPED, window, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr, REVERSE: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradient of one head of a tile's queries through `band_kernel`: DQ [N, H, D]."""
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
        q, do, lse, gate, dot = gradient_rows(Q, D_OUT, LSE, GATES, DOTS, 0, at_q, valid, D, D_P2, BRANCHES, BRANCH)

        by_first = seen_keys(SEEN, q0, first, n_q, n_k, S)
        by_last = seen_keys(SEEN, q0, tl.minimum(first + BM, n_q) - 1, n_q, n_k, S)
        dq = tl.zeros((BM, D_P2), tl.float32)
        j = tl.arange(0, BN)
        for start in range(tl.maximum(by_first - window, 0), by_last, BN):
            at = (token(key0, start + j, n_k // S, REVERSE) * G + g) * D
            there = start + j < by_last
            k = load(K, at, there, D, D_P2, True)
            v = load(V, at, there, D, D_P2, True)
            key = (start + j)[None, :]
            keep = in_band(key, seen[:, None], window, SKIPPED, at_skipped, valid[:, None], WORDS)
            dq = dq_step(dq, q, do, k, v, keep, scale, lse, dot, True, PRECISION)
        store_dq(DQ, at_q, valid, dq, gate, scale, D, D_P2, ADD)


@jit
def selected_dq_kernel(
    Q, K, V, DQ, D_OUT, LSE, GATES, DOTS, UNION, BITS, SIZES, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr,
    BRANCHES: tl.constexpr, BRANCH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's queries through `selected_kernel`: DQ [N, H, D]."""
    tile = tl.program_id(0)
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = place(tile, CU_Q, CU_K, B, BQ, 0, S, B_P2)
    if first < n_q:
        m, valid, at_q = selection_rows(first, q0, n_q, g, H, G, BQ, HEADS, ROWS)
        i = n_k - n_q + m
        q, do, lse, gate, dot = gradient_rows(Q, D_OUT, LSE, GATES, DOTS, 0, at_q, valid, D, D_P2, BRANCHES, BRANCH)

        dq = tl.zeros((ROWS, D_P2), tl.float32)
        j = tl.arange(0, BN)
        PARTS: tl.constexpr = S // BN
        at = (g * tl.num_programs(0) + tile).to(tl.int64)
        size = tl.load(SIZES + 2 * at)
        behind = tl.load(SIZES + 2 * at + 1)
        at = at * ROOM

        # Where keys stand is known a turn before they are loaded, and there are two loops, as in `selected_kernel`.
        key, on = union_part(UNION, BITS, at, 0, size, m - first, S, PARTS)
        for part in range(behind * PARTS):
            where = ((k0 + key + j).to(tl.int64) * G + g) * D
            k = load(K, where, valid, D, D_P2, False)
            v = load(V, where, valid, D, D_P2, False)
            dq = dq_step(dq, q, do, k, v, on, scale, tl.where(on, lse, float("inf")), dot, False, PRECISION)
            key, on = union_part(UNION, BITS, at, part + 1, size, m - first, S, PARTS)
        for part in range(behind * PARTS, size * PARTS):
            where = ((k0 + key + j).to(tl.int64) * G + g) * D
            k = load(K, where, key + j < n_k, D, D_P2, True)
            v = load(V, where, key + j < n_k, D, D_P2, True)
            keep = (key + j)[None, :] <= i[:, None]
            dq = dq_step(dq, q, do, k, v, keep, scale, tl.where(on, lse, float("inf")), dot, True, PRECISION)
            key, on = union_part(UNION, BITS, at, part + 1, size, m - first, S, PARTS)
        store_dq(DQ, at_q, valid, dq, gate, scale, D, D_P2, ADD)


# Gradients of keys and values.


@jit
def dkv_step(dk, dv, q, do, k, v, keep, scale, lse, gate, dot, PRECISION: tl.constexpr):
    """Add to dk, dv [n, D] the gradients of keys through rows q, do [R, D], before the scale; keep [n, R]."""
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]) * gate[None, :]
    p = tl.where(keep, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - dot[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@jit
def band_dkv_kernel(
    Q, K, V, DK, DV, D_OUT, LSE, GATES, DOTS, SEEN, SKIPPED, window, n_keys, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr, REVERSE: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of `band_kernel` through a split of the queries that see them: DK, DV fp32 [splits, n_keys,
    G, D]."""
    g = tl.program_id(1)
    split = tl.program_id(2)
    first, q0, k0, key0, n_q, n_k = place(tl.program_id(0), CU_Q, CU_K, B, BN, S, S, B_P2)
    if first < n_k // S:
        j = first + tl.arange(0, BN)
        there = j < n_k // S
        where = (token(key0, j, n_k // S, REVERSE) * G + g) * D
        k = load(K, where, there, D, D_P2, True)
        v = load(V, where, there, D, D_P2, True)

        # The queries from `low` to `high` see one of the keys; this program takes its share of them.
        if SEEN is None:
            low = tl.maximum((first + 1) * S - 1 - (n_k - n_q), 0)
            high = tl.minimum((first + BN + window) * S - 1 - (n_k - n_q), n_q)
        else:
            low = 0 * n_q
            high = n_q
        share = tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(2) * BM) * BM
        low += split * share
        high = tl.minimum(high, low + share)

        # Head by head. Offsets are from a tile's first row, so that what differs between rows stays the same.
        r = tl.arange(0, BM)
        steps = -r if REVERSE else r
        dk = tl.zeros((BN, D_P2), tl.float32)
        dv = tl.zeros((BN, D_P2), tl.float32)
        start, h = low, g * (H // G)
        for _ in range(tl.cdiv(tl.maximum(high - low, 0), BM) * (H // G)):
            m = start + r
            valid = m < high
            base = token(q0, start, n_q, REVERSE) * H + h
            q, do, lse, gate, dot = gradient_rows(
                Q, D_OUT, LSE, GATES, DOTS, base, steps * H, valid, D, D_P2, BRANCHES, BRANCH
            )
            seen = seen_keys(SEEN, q0, m, n_q, n_k, S)[None, :]
            at_skipped = ((q0 + m).to(tl.int64) * G + g)[None, :]
            keep = in_band(j[:, None], seen, window, SKIPPED, at_skipped, valid[None, :], WORDS)
            dk, dv = dkv_step(dk, dv, q, do, k, v, keep, scale, lse, gate, dot, PRECISION)
            start += BM
            h = tl.where(start < high, h, h + 1)
            start = tl.where(start < high, start, low)

        where += split * (tl.cast(n_keys, tl.int64) * (G * D))
        store(DK, where, there, dk * (scale * LN_2), D, D_P2)
        store(DV, where, there, dv, D, D_P2)


@jit
def selected_dkv_kernel(
    Q, K, V, DK, DV, D_OUT, LSE, GATES, DOTS, QUERIES, LIST_OF, START_OF, OFFSETS, g0, blocks, scale, CU_Q, CU_K, B,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, PRECISION: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, LIST: tl.constexpr,
    BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of a block through a piece of the list of queries that chose it: DK, DV fp32 [pieces, S, D].

    QUERIES and the others are those of `Gradients.lists`: `blocks` lists for each KV head, from g0 on.
    """
    piece = tl.program_id(0)
    list_ = tl.load(LIST_OF + piece)
    if list_ >= 0:
        g = g0 + list_ // blocks
        first, q0, k0, block0, n_q, n_k = place(list_ % blocks, CU_Q, CU_K, B, S, 1, S, B_P2)
        start = tl.load(START_OF + piece)
        stop = tl.minimum(tl.load(OFFSETS + list_ + 1), start + LIST)

        j = tl.program_id(1) * BN + tl.arange(0, BN)
        there = first + j < n_k
        where = ((k0 + first + j).to(tl.int64) * G + g) * D
        k = load(K, where, there, D, D_P2, True)
        v = load(V, where, there, D, D_P2, True)

        r = tl.arange(0, ROWS)
        head = r % HEADS
        is_head = (r < BQ * HEADS) & (head < H // G)
        dk = tl.zeros((BN, D_P2), tl.float32)
        dv = tl.zeros((BN, D_P2), tl.float32)
        query = tl.load(QUERIES + start + r // HEADS, mask=start + r // HEADS < stop, other=-1)
        for at in range(start, stop, BQ):
            valid = (query >= 0) & is_head
            at_q = query.to(tl.int64) * H + g * (H // G) + head
            q, do, lse, gate, dot = gradient_rows(Q, D_OUT, LSE, GATES, DOTS, 0, at_q, valid, D, D_P2, BRANCHES, BRANCH)
            i = query - q0 + n_k - n_q
            keep = (first + j)[:, None] <= i[None, :]
            dk, dv = dkv_step(dk, dv, q, do, k, v, keep, scale, lse, gate, dot, PRECISION)
            # A turn before their rows are loaded, as in `selected_kernel`.
            after = at + BQ + r // HEADS
            query = tl.load(QUERIES + after, mask=after < stop, other=-1)

        out = (piece.to(tl.int64) * S + j) * D
        store(DK, out, there, dk * (scale * LN_2), D, D_P2)
        store(DV, out, there, dv, D, D_P2)


@jit
def collect_kernel(
    TOKENS_DK, TOKENS_DV, MEANS_DK, MEANS_DV, LIST_DK, LIST_DV, FIRST_PIECE, DK, DV, splits, n_means, g0, CU_Q, CU_K, B,
    G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv [M, G, D] of BN keys of a block: the sum of its partial sums, each branch's in order.

    TOKENS_ [1, M, G, D] are those of bands of tokens, MEANS_ [splits, n_means, G, D] of the block's means, LIST_
    [pieces, S, D] of lists of queries; None if there is no such branch.
    """
    block = tl.program_id(0)
    g = g0 + tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = place(block, CU_Q, CU_K, B, S, 1, S, B_P2)
    if first < n_k:
        j = tl.program_id(2) * BN + tl.arange(0, BN)
        there = first + j < n_k
        where = ((k0 + first + j).to(tl.int64) * G + g) * D
        at_mean = ((block0 + first // S).to(tl.int64) * G + g) * D
        list_ = tl.program_id(1) * tl.num_programs(0) + block
        for which in tl.static_range(2):
            total = tl.zeros((BN, D_P2), tl.float32)
            if TOKENS_DK is not None:
                total += load(TOKENS_DV if which else TOKENS_DK, where, there, D, D_P2, True)
            if LIST_DK is not None:
                for piece in range(tl.load(FIRST_PIECE + list_), tl.load(FIRST_PIECE + list_ + 1)):
                    at = (tl.cast(piece, tl.int64) * S + j) * D
                    total += load(LIST_DV if which else LIST_DK, at, there, D, D_P2, True)
            if MEANS_DK is not None:  # noqa: SIM102 (decided when compiling)
                if first + S <= n_k:
                    mean = tl.zeros((D_P2,), tl.float32)
                    d = tl.arange(0, D_P2)
                    for split in range(splits):
                        at = tl.cast(split, tl.int64) * n_means * (G * D) + at_mean + d
                        mean += tl.load((MEANS_DV if which else MEANS_DK) + at, mask=d < D, other=0.0)
                    total += mean[None, :] / S
            store(DV if which else DK, where, there, total, D, D_P2)
