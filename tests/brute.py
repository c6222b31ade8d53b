"""A brute force of nsa_torch.py, written with nothing but loops, and what tests that
compare with it share.

`Brute` has the doors of nsa_torch and asks, for every query token and head, which keys it may see. It is slow, needs no
masks, and is meant to be read.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from videonsa import nsa_torch

# ----------------------------------------------------------------------------------------------------------------------
# The brute force
# ----------------------------------------------------------------------------------------------------------------------


class Brute:
    """The five functions of nsa_torch as loops over samples, query tokens and heads, in the dtype of their inputs."""

    @staticmethod
    def compressed_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, block_size=64, scale=None):
        rows = []
        for keys, values, queries in samples(q, k, v, cu_seqlens, cu_seqlens_k):
            mean_keys = [block.mean(0) for block in keys.split(block_size)]  # each [G, D]
            mean_values = [block.mean(0) for block in values.split(block_size)]
            for i, row in queries:
                visible = [j for j in range(len(mean_keys)) if (j + 1) * block_size - 1 <= i]  # last token of j is seen
                for h in range(q.shape[1]):
                    g = kv_head(h, q, k)
                    seen = [mean_keys[j][g] for j in visible], [mean_values[j][g] for j in visible]
                    rows.append(attend(row[h], *seen, scale))
        return stack(rows, q)

    @staticmethod
    def select_blocks(q, k, lse, cu_seqlens, *, cu_seqlens_k=None, block_size=64, block_count=32, scale=None):
        importances = block_importance(q, k, cu_seqlens, cu_seqlens_k, block_size, scale)
        chosen = torch.full((k.shape[1], len(q), block_count), -1, dtype=torch.int32)
        for (g, n), importance in importances.items():
            c = len(importance)  # the own block: importance covers the blocks before it
            picked = {0, c, max(c - 1, 0)}
            for j in sorted(range(c), key=lambda j: (-importance[j], j)):  # most important first, then lower index
                if len(picked) < block_count:
                    picked.add(j)
            chosen[g, n, : len(picked)] = torch.tensor(sorted(picked), dtype=torch.int32)
        return chosen

    @staticmethod
    def selected_attention(q, k, v, blocks, cu_seqlens, *, cu_seqlens_k=None, block_size=64, scale=None):
        rows = []
        for keys, values, queries in samples(q, k, v, cu_seqlens, cu_seqlens_k):
            for i, row in queries:
                n = len(rows) // q.shape[1]  # packed index of this query
                for h in range(q.shape[1]):
                    g = kv_head(h, q, k)
                    chosen = [j for j in blocks[g, n].tolist() if j >= 0]
                    visible = [t for j in chosen for t in range(j * block_size, (j + 1) * block_size) if t <= i]
                    rows.append(attend(row[h], keys[visible, g], values[visible, g], scale))
        return stack(rows, q)

    @staticmethod
    def window_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, window_size=256, scale=None):
        rows = []
        for keys, values, queries in samples(q, k, v, cu_seqlens, cu_seqlens_k):
            for i, row in queries:
                first = max(i - window_size + 1, 0)
                for h in range(q.shape[1]):
                    g = kv_head(h, q, k)
                    rows.append(attend(row[h], keys[first : i + 1, g], values[first : i + 1, g], scale))
        return stack(rows, q)

    @staticmethod
    def nsa_attention(
        q,
        k,
        v,
        gates,
        cu_seqlens,
        *,
        cu_seqlens_k=None,
        block_size=64,
        block_count=32,
        window_size=256,
        scale=None,
        blocks=None,  # instead of choosing them
    ):
        streams = {"cu_seqlens_k": cu_seqlens_k, "scale": scale}
        if blocks is None:
            blocks = Brute.select_blocks(
                q, k, None, cu_seqlens, block_size=block_size, block_count=block_count, **streams
            )
        compressed, _ = Brute.compressed_attention(q, k, v, cu_seqlens, block_size=block_size, **streams)
        selected, _ = Brute.selected_attention(q, k, v, blocks, cu_seqlens, block_size=block_size, **streams)
        window, _ = Brute.window_attention(q, k, v, cu_seqlens, window_size=window_size, **streams)
        return gates[..., 0:1] * compressed + gates[..., 1:2] * selected + gates[..., 2:3] * window


def samples(q, k, v, cu_seqlens, cu_seqlens_k):
    """Per sample: its keys and values [n, G, D], and its queries as pairs (stream index, row [H, D])."""
    cu_q = cu_seqlens.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for first_q, end_q, first_k, end_k in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        n, m = end_k - first_k, end_q - first_q
        queries = zip(range(n - m, n), q[first_q:end_q].unbind(0), strict=True)  # the last m tokens of the stream
        yield k[first_k:end_k], v[first_k:end_k], queries


def kv_head(h, q, k):
    return h // (q.shape[1] // k.shape[1])


def attend(query, keys, values, scale):
    """One query [D] over the keys and values it sees, each a list of [D] or [t, D] -> o [D], lse []."""
    if len(keys) == 0:
        return 0 * query, query.new_tensor(-torch.inf)
    keys = torch.stack(keys) if isinstance(keys, list) else keys
    values = torch.stack(values) if isinstance(values, list) else values
    scores = keys @ query * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(0) @ values, scores.detach().logsumexp(0)


def stack(rows, q):
    """Rows (o [D], lse []) in order of query, then head -> o [N, H, D], lse [N, H]."""
    if not rows:
        return q.clone(), q.new_zeros(q.shape[:2])
    o, lse = zip(*rows, strict=True)
    return torch.stack(o).view(q.shape), torch.stack(lse).view(q.shape[:2])


def block_importance(q, k, cu_seqlens, cu_seqlens_k, block_size, scale):
    """(KV head, packed query) -> list over the blocks before the query's own: compression probability, summed over
    the query heads of the KV head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    importance, n = {}, 0
    for keys, _, queries in samples(q.detach(), k.detach(), k.detach(), cu_seqlens, cu_seqlens_k):
        mean_keys = [block.mean(0) for block in keys.split(block_size)]
        for i, row in queries:
            c = i // block_size
            visible = [j for j in range(len(mean_keys)) if (j + 1) * block_size - 1 <= i]  # c itself at its last token
            for g in range(k.shape[1]):
                total = [0.0] * c
                heads = [h for h in range(q.shape[1]) if kv_head(h, q, k) == g]
                for h in heads if visible else []:
                    p = (torch.stack([mean_keys[j][g] for j in visible]) @ row[h] * scale).softmax(0).tolist()
                    total = [total[j] + p[j] for j in range(c)]
                importance[g, n] = total
            n += 1
    return importance


# ----------------------------------------------------------------------------------------------------------------------
# Cases, inputs, comparison
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    keys: tuple  # stream length of each sample
    queries: tuple = None  # queries of each sample, default all
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    block_size: int = 16
    block_count: int = 3
    window_size: int = 5
    scale: float = None

    def __str__(self):
        lengths = "+".join(map(str, self.keys))
        queries = "" if self.queries is None else ",last" + "+".join(map(str, self.queries))
        scale = "" if self.scale is None else f",scale{self.scale}"
        return (
            f"{lengths}{queries},H{self.heads},G{self.kv_heads},D{self.dim},S{self.block_size},"
            f"T{self.block_count},W{self.window_size}{scale}"
        )


CASES = [
    Case((1,), heads=1, window_size=1),
    Case((63,), heads=4, kv_heads=2, block_size=64),
    Case((64,), heads=4, kv_heads=4, dim=32, block_size=64, window_size=64),
    Case((65,), heads=7, block_size=64, window_size=1),
    Case((200,), heads=2, kv_heads=2, block_size=64, block_count=3, window_size=64),
    Case((63,), heads=2, kv_heads=2, dim=32, window_size=1000),
    Case((64,), heads=8, kv_heads=2, block_count=4, window_size=16),
    Case((65,), heads=14, kv_heads=2, window_size=17),
    Case((200,), heads=16, block_count=4, window_size=64),
    Case((200,), heads=4, kv_heads=2, dim=32, block_count=3, window_size=5, scale=0.7),
    Case((200,), heads=7, block_count=7, window_size=1, scale=0.05),
    Case((200,), heads=3, kv_heads=3, block_count=32, window_size=200),
    Case((64, 0, 1, 200, 63, 65), heads=4, kv_heads=2, block_count=4, window_size=64),
    Case((0, 200, 65, 0, 130, 0), heads=2, block_size=64, block_count=3, window_size=100),
    Case((0, 0), heads=2),
    Case((150, 90, 40, 0, 33), (16, 1, 40, 0, 0), heads=4, kv_heads=2, block_count=4, window_size=20),
]
WHOLE_CASE = Case((150, 0, 97), heads=4, kv_heads=2, block_count=4, window_size=20)  # where one case is enough
BRANCHES = ["compression", "selection", "window", "whole"]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_branch = pytest.mark.parametrize("branch", BRANCHES)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make_inputs(case, dtype=torch.float64, seed=0):
    """(q, k, v, gates), leaves that want a gradient, and the two cu_seqlens as keywords."""
    generator = torch.Generator().manual_seed(seed)
    queries = case.keys if case.queries is None else case.queries
    n, m = sum(queries), sum(case.keys)
    q = 2 * torch.randn(n, case.heads, case.dim, generator=generator, dtype=torch.float64)
    k = torch.randn(m, case.kv_heads, case.dim, generator=generator, dtype=torch.float64)
    v = torch.randn(m, case.kv_heads, case.dim, generator=generator, dtype=torch.float64)
    gates = torch.rand(n, case.heads, 3, generator=generator, dtype=torch.float64)
    tensors = [x.to(dtype).requires_grad_() for x in (q, k, v, gates)]
    return tensors, {
        "cu_seqlens": offsets(queries),
        "cu_seqlens_k": None if case.queries is None else offsets(case.keys),
    }


def run_branch(branch, tensors, lengths, case, doors=nsa_torch, blocks=None):
    """Output [N, H, D] of one branch or of the whole; the selection branch chooses its blocks unless given some."""
    q, k, v, gates = tensors
    blocked = dict(lengths, block_size=case.block_size, scale=case.scale)
    if branch == "compression":
        return doors.compressed_attention(q, k, v, **blocked)[0]
    if branch == "selection":
        blocks = choose(tensors, lengths, case, doors) if blocks is None else blocks
        return doors.selected_attention(q, k, v, blocks, **blocked)[0]
    if branch == "window":
        return doors.window_attention(q, k, v, window_size=case.window_size, scale=case.scale, **lengths)[0]
    given = {} if blocks is None else {"blocks": blocks}  # only the brute force takes them
    return doors.nsa_attention(
        q, k, v, gates, block_count=case.block_count, window_size=case.window_size, **blocked, **given
    )


def choose(tensors, lengths, case, doors=nsa_torch):
    q, k, v, _ = tensors
    blocked = dict(lengths, block_size=case.block_size, scale=case.scale)
    _, lse = doors.compressed_attention(q, k, v, **blocked)
    return doors.select_blocks(q, k, lse, block_count=case.block_count, **blocked)


def run_lse(branch, tensors, lengths, case, doors=nsa_torch):
    q, k, v, _ = tensors
    blocked = dict(lengths, block_size=case.block_size, scale=case.scale)
    if branch == "compression":
        return doors.compressed_attention(q, k, v, **blocked)[1]
    if branch == "selection":
        return doors.selected_attention(q, k, v, choose(tensors, lengths, case, doors), **blocked)[1]
    return doors.window_attention(q, k, v, window_size=case.window_size, scale=case.scale, **lengths)[1]


def gradients(out, tensors, seed=1):
    """Of a random projection of `out`, with zeros for a tensor that `out` does not depend on (gates in a branch)."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grads = torch.autograd.grad(out, tensors, cotangent.to(out.dtype), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, grads, strict=True)]


@cache
def reference(case, branch):
    """Brute-force output and gradients of a case, computed once for all tests."""
    tensors, lengths = make_inputs(case)
    out = run_branch(branch, tensors, lengths, case, doors=Brute)
    return out.detach(), gradients(out, tensors)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative_rms(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()
