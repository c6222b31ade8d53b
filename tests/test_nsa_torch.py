"""nsa_torch.py against a brute force written from section 2.1 of the design with nothing but loops.

The first half is that brute force: `Brute` has the doors of nsa_torch and asks, for every query token and head, which
keys it may see. It is slow, needs no masks, and is meant to be read. The second half compares: values, gradients,
chosen blocks, what may not leak, dtypes, memory, errors.
"""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from videonsa import nsa_torch
from videonsa.nsa_torch import (
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

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


# ----------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ----------------------------------------------------------------------------------------------------------------------


@each_branch
@each_case
def test_output_equals_brute_force(case, branch):
    tensors, lengths = make_inputs(case)
    out = run_branch(branch, tensors, lengths, case)
    assert out.dtype == torch.float64 and out.shape == tensors[0].shape
    assert_close(out.detach(), reference(case, branch)[0])


@each_branch
@each_case
def test_gradients_equal_autograd_through_brute_force(case, branch):
    tensors, lengths = make_inputs(case)
    grads = gradients(run_branch(branch, tensors, lengths, case), tensors)
    for grad, expected in zip(grads, reference(case, branch)[1], strict=True):
        assert_close(grad, expected)


@each_case
def test_chosen_blocks_equal_brute_force(case):
    tensors, lengths = make_inputs(case)
    blocks = choose(tensors, lengths, case)
    assert blocks.dtype == torch.int32
    assert torch.equal(blocks, choose(tensors, lengths, case, doors=Brute))


@pytest.mark.parametrize("branch", ["compression", "selection", "window"])
@each_case
def test_lse_equals_brute_force_and_carries_no_gradient(case, branch):
    tensors, lengths = make_inputs(case)
    lse = run_lse(branch, tensors, lengths, case)
    assert lse.dtype == torch.float64 and lse.shape == tensors[0].shape[:2]
    assert not lse.requires_grad
    assert_close(lse, run_lse(branch, tensors, lengths, case, doors=Brute))


def test_lse_is_the_natural_log_of_the_sum_of_exponentials_of_visible_scores():
    case = Case((100,), heads=2, kv_heads=2, window_size=20, scale=0.3)
    tensors, lengths = make_inputs(case)
    q, k, _, _ = (x.detach().transpose(0, 1) for x in tensors)
    i, t = torch.arange(100)[:, None], torch.arange(100)
    scores = q @ k.transpose(1, 2) * case.scale  # [heads, queries, keys]
    window = scores.masked_fill((t > i) | (t <= i - 20), -torch.inf).logsumexp(-1).T
    assert_close(run_lse("window", tensors, lengths, case), window)

    chosen = choose(tensors, lengths, case)  # [heads, queries, block_count]
    visible = (chosen[..., None] == t // 16).any(-2) & (t <= i)
    selected = scores.masked_fill(~visible, -torch.inf).logsumexp(-1).T
    assert_close(run_lse("selection", tensors, lengths, case), selected)

    mean_keys = k[:, :96].unflatten(1, (6, 16)).mean(2)
    scores = q @ mean_keys.transpose(1, 2) * case.scale  # [heads, queries, blocks]
    compressed = scores.masked_fill(torch.arange(6) * 16 + 15 > i, -torch.inf).logsumexp(-1).T
    assert_close(run_lse("compression", tensors, lengths, case), compressed)


def test_rows_without_a_complete_block_get_zero_and_minus_infinity_from_compression():
    case = Case((40, 10), heads=4, kv_heads=2)
    tensors, lengths = make_inputs(case)
    o, lse = compressed_attention(*tensors[:3], **lengths, block_size=16)
    blind = torch.tensor([i < 15 for n in case.keys for i in range(n)])
    assert torch.equal(o[blind], torch.zeros_like(o[blind]))
    assert torch.equal(lse[blind], torch.full_like(lse[blind], -torch.inf))
    assert lse[~blind].isfinite().all() and (o[~blind] != 0).all()
    grads = torch.autograd.grad(o.square().sum(), tensors[:3])
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(grads[0][blind], torch.zeros_like(o[blind]))


@pytest.mark.parametrize("doors", [nsa_torch, Brute], ids=["nsa_torch", "brute force"])
@pytest.mark.parametrize("branch", ["selection", "window"])
def test_seeing_everything_is_dense_causal_attention(branch, doors):
    case = Case((200,), heads=4, kv_heads=2, block_count=13, window_size=200)
    tensors, lengths = make_inputs(case)
    q, k, v = (x.detach().transpose(0, 1) for x in tensors[:3])
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
    assert_close(run_branch(branch, tensors, lengths, case, doors).detach(), dense)


def test_defaults_are_blocks_of_64_32_of_them_and_a_window_of_256():
    case = Case((34 * 64 + 3,), heads=2, block_size=64, block_count=32, window_size=256)
    tensors, lengths = make_inputs(case, dtype=torch.float32)
    q, k, v, gates = (x.detach() for x in tensors)
    cu = lengths["cu_seqlens"]
    o, lse = compressed_attention(q, k, v, cu)
    blocks = select_blocks(q, k, lse, cu)
    with torch.no_grad():
        assert torch.equal(o, run_branch("compression", tensors, lengths, case))
        assert torch.equal(blocks, choose(tensors, lengths, case))
        assert torch.equal(selected_attention(q, k, v, blocks, cu)[0], run_branch("selection", tensors, lengths, case))
        assert torch.equal(window_attention(q, k, v, cu)[0], run_branch("window", tensors, lengths, case))
        assert torch.equal(nsa_attention(q, k, v, gates, cu), run_branch("whole", tensors, lengths, case))


def test_selected_attention_sees_any_blocks_it_is_given_up_to_the_query():
    case = Case((100, 50), heads=4, kv_heads=2)
    tensors, lengths = make_inputs(case)
    generator = torch.Generator().manual_seed(3)
    blocks = torch.full((2, 150, 6), -1, dtype=torch.int32)
    for g in range(2):
        for n in range(150):
            i, length = (n, 100) if n < 100 else (n - 100, 50)
            others = torch.randperm((length + 15) // 16, generator=generator)[:4].tolist()
            chosen = sorted({i // 16, *others})  # the own block, and others before or after it
            blocks[g, n, : len(chosen)] = torch.tensor(chosen)
    out = run_branch("selection", tensors, lengths, case, blocks=blocks)
    expected = run_branch("selection", tensors, lengths, case, Brute, blocks=blocks)
    assert_close(out.detach(), expected.detach())
    for grad, expected_grad in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
        assert_close(grad, expected_grad)


@each_branch
def test_gradcheck_passes(branch):
    case = Case((70, 3), heads=2, dim=3)
    tensors, lengths = make_inputs(case)
    needed = tensors if branch == "whole" else tensors[:3]
    blocks = choose(tensors, lengths, case) if branch == "selection" else None

    def call(*needed):
        return run_branch(branch, [*needed, *tensors[len(needed) :]], lengths, case, blocks=blocks)

    assert torch.autograd.gradcheck(call, needed, fast_mode=True)


def test_gradcheck_passes_with_listed_query_heads():
    (q, k, v, _), lengths = make_inputs(Case((40, 3), heads=3, kv_heads=2, dim=3))
    gates = torch.rand(43, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def call(*tensors):
        sizes = {"block_size": 16, "block_count": 3, "window_size": 5}
        return nsa_attention(*tensors, **lengths, **sizes, query_heads=[[2], [1, 0, 2]])

    assert torch.autograd.gradcheck(call, (q, k, v, gates), fast_mode=True)


def test_no_gradient_flows_through_the_choice_of_blocks():
    tensors, lengths = make_inputs(WHOLE_CASE)
    blocks = choose(tensors, lengths, WHOLE_CASE)
    assert not blocks.requires_grad
    only_selection = torch.zeros_like(tensors[3])
    only_selection[..., 1] = 1
    whole = run_branch("whole", [*tensors[:3], only_selection], lengths, WHOLE_CASE)
    fixed = run_branch("selection", tensors, lengths, WHOLE_CASE, blocks=blocks)
    assert_close(whole, fixed)
    for grad, expected in zip(gradients(whole, tensors[:3]), gradients(fixed, tensors[:3]), strict=True):
        assert_close(grad, expected)


@each_branch
def test_one_tensor_can_be_query_key_and_value(branch):
    case = Case((90, 40), heads=2, kv_heads=2)
    tensors, lengths = make_inputs(case)
    x, gates = tensors[0], tensors[3]
    (grad,) = gradients(run_branch(branch, [x, x, x, gates], lengths, case), [x])
    (expected,) = gradients(run_branch(branch, [x, x, x, gates], lengths, case, Brute), [x])
    assert_close(grad, expected)


@each_branch
def test_non_contiguous_inputs_give_the_same_output_and_gradients(branch):
    tensors, lengths = make_inputs(WHOLE_CASE)
    q, k, v, gates = tensors
    strided = [
        q.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([k, k + 1], -1)[..., 0],
        torch.stack([v + 1, v], 1)[:, 1],
        gates.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ]
    assert not any(x.is_contiguous() for x in strided)
    out = run_branch(branch, strided, lengths, WHOLE_CASE)
    expected = run_branch(branch, tensors, lengths, WHOLE_CASE)
    assert_close(out, expected, 1e-12)
    for grad, expected_grad in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
        assert_close(grad, expected_grad, 1e-12)
    # .sum() hands the backward an expanded gradient, of stride 0
    out = run_branch(branch, tensors, lengths, WHOLE_CASE)
    for grad, expected in zip(
        torch.autograd.grad(out.sum(), tensors[:3], retain_graph=True, allow_unused=True),
        torch.autograd.grad(out, tensors[:3], torch.ones_like(out), allow_unused=True),
        strict=True,
    ):
        assert_close(grad, expected, 1e-12)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "gates"])
def test_one_input_alone_can_want_a_gradient(wanted):
    tensors, lengths = make_inputs(WHOLE_CASE)
    everything = gradients(run_branch("whole", tensors, lengths, WHOLE_CASE), tensors)
    index = ["q", "k", "v", "gates"].index(wanted)
    tensors = [x.detach().requires_grad_(i == index) for i, x in enumerate(tensors)]
    (grad,) = gradients(run_branch("whole", tensors, lengths, WHOLE_CASE), tensors[index : index + 1])
    assert_close(grad, everything[index], 1e-12)


@each_branch
def test_output_is_the_same_without_gradients(branch):
    tensors, lengths = make_inputs(WHOLE_CASE)
    with_grad = run_branch(branch, tensors, lengths, WHOLE_CASE)
    with torch.no_grad():
        without = run_branch(branch, tensors, lengths, WHOLE_CASE)
    assert with_grad.requires_grad and not without.requires_grad
    assert torch.equal(with_grad, without)


# ----------------------------------------------------------------------------------------------------------------------
# Which blocks are chosen
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_count", [3, 4, 6])
def test_first_previous_and_own_block_are_always_chosen(block_count):
    case = Case((200, 70), heads=4, kv_heads=2, block_count=block_count)
    tensors, lengths = make_inputs(case)
    blocks = choose(tensors, lengths, case)
    for n, row in enumerate(blocks.transpose(0, 1)):
        c = (n if n < 200 else n - 200) // 16
        for chosen in row.tolist():
            real = [j for j in chosen if j >= 0]
            assert {0, max(c - 1, 0), c} <= set(real)
            assert real == sorted(set(real)) and real[-1] == c  # ascending, none twice, none after the own block
            assert chosen == real + [-1] * (block_count - len(real))  # padded at the end
            assert len(real) == min(block_count, c + 1)  # every block when there are no more than block_count


def test_every_block_is_chosen_when_there_are_no_more_than_block_count():
    case = Case((200, 33), heads=2, kv_heads=2, block_count=13)
    tensors, lengths = make_inputs(case)
    blocks = choose(tensors, lengths, case)
    for n, row in enumerate(blocks.transpose(0, 1).tolist()):
        c = (n if n < 200 else n - 200) // 16
        assert row == [[*range(c + 1), *[-1] * (12 - c)]] * 2


@pytest.mark.parametrize("n", [200, 1700])
def test_ties_go_to_the_lower_index_when_all_scores_are_equal(n):
    case = Case((n,), heads=14, kv_heads=2, block_count=5)  # 1700: enough blocks to undo an unstable sort
    (q, k, v, gates), lengths = make_inputs(case)
    blocks = choose([torch.zeros_like(q), k, v, gates], lengths, case).transpose(0, 1).tolist()
    for i in range(n):
        c = i // 16
        expected = [*range(c + 1)] if c < 5 else [0, 1, 2, c - 1, c]
        assert blocks[i] == [expected + [-1] * (5 - len(expected))] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("twins", [(2, 5), (3, 4, 9), (1, 10)])
def test_ties_between_equal_blocks_go_to_the_lower_index(twins, dtype):
    case = Case((208,), heads=4, kv_heads=2, block_count=4, scale=0.25)
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (208, 4, 16), generator=generator).to(dtype)  # small integers: every sum is exact
    q[..., :8] = 2  # only the twins answer to this half, and so beat every other block
    k = torch.randint(-1, 2, (13, 16, 2, 16), generator=generator).to(dtype)
    k[..., :8] = 0
    for twin in twins:
        k[twin] = k[twins[0]]
        k[twin, ..., :8] = 2
    k = k.flatten(0, 1)
    tensors, lengths = [q, k, k, None], {"cu_seqlens": offsets((208,))}
    blocks = choose(tensors, lengths, case)
    for n in range(208):
        c = n // 16
        candidates = [j for j in twins if 0 < j < c - 1]
        if candidates and c >= 4:
            assert blocks[:, n].tolist() == [[0, candidates[0], c - 1, c]] * 2
    if dtype == torch.float64:
        assert torch.equal(blocks, choose(tensors, lengths, case, Brute))


def test_importance_is_probability_summed_over_the_heads_of_a_group():
    # Head 0 is sure of block 1; heads 1 and 2 lean to block 2; scores alone would say block 1, and so would a maximum.
    q = torch.zeros(96, 6, 16, dtype=torch.float64)
    k = torch.zeros(96, 2, 16, dtype=torch.float64)
    k[16:32, :, 0], k[32:48, :, 1] = 1, 1
    q[:, 0, 0], q[:, 1:3, 1] = 40, 10
    q[:, 3, 1], q[:, 4:6, 0] = 40, 10  # the second group the other way round
    case = Case((96,), heads=6, kv_heads=2, block_count=4)
    blocks = choose([q, k, k, None], {"cu_seqlens": offsets((96,))}, case)
    assert blocks[0, 80:].tolist() == [[0, 2, 4, 5]] * 16
    assert blocks[1, 80:].tolist() == [[0, 1, 4, 5]] * 16


# ----------------------------------------------------------------------------------------------------------------------
# What may not leak
# ----------------------------------------------------------------------------------------------------------------------

LEAK_CASE = Case((120, 75), heads=4, kv_heads=2, block_count=4, window_size=20)


def perturbed(x, rows, columns=slice(None)):
    x = x.detach().clone()
    x[rows, columns] = 50 - 3 * x[rows, columns]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("j", [0, 1, 15, 16, 37, 63, 64, 79, 80, 119])
@each_branch
def test_no_output_before_a_token_depends_on_it(branch, j, dtype):
    (q, k, v, gates), lengths = make_inputs(LEAK_CASE, dtype)
    before = run_branch(branch, [q, k, v, gates], lengths, LEAK_CASE)
    after = run_branch(branch, [perturbed(q, j), perturbed(k, j), perturbed(v, j), gates], lengths, LEAK_CASE)
    assert torch.equal(before[:j], after[:j])
    assert torch.equal(before[120:], after[120:])
    first_seen = (j // 16 + 1) * 16 - 1 if branch == "compression" else j  # compression sees a block once complete
    if first_seen < 120:
        assert not torch.equal(before[first_seen], after[first_seen])
    if branch == "compression":
        keys_only = run_branch(branch, [q, perturbed(k, j), perturbed(v, j), gates], lengths, LEAK_CASE)
        assert torch.equal(before[:first_seen], keys_only[:first_seen])


@pytest.mark.parametrize("j", [16, 37, 64, 119])
def test_no_choice_of_blocks_before_a_token_depends_on_it(j):
    (q, k, v, gates), lengths = make_inputs(LEAK_CASE)
    before = choose([q, k, v, gates], lengths, LEAK_CASE)
    after = choose([perturbed(q, j), perturbed(k, j), perturbed(v, j), gates], lengths, LEAK_CASE)
    assert torch.equal(before[:, :j], after[:, :j])
    assert torch.equal(before[:, 120:], after[:, 120:])


@pytest.mark.parametrize("j", [1, 16, 37, 64, 80])
@each_branch
def test_no_gradient_reaches_tokens_after_the_query(branch, j):
    tensors, lengths = make_inputs(LEAK_CASE)
    out = run_branch(branch, tensors, lengths, LEAK_CASE)
    grads = torch.autograd.grad(out[:j].square().sum(), tensors[:3])
    assert all(torch.equal(grad[j:], torch.zeros_like(grad[j:])) for grad in grads)


@pytest.mark.parametrize("touched", [0, 1])
@each_branch
def test_a_sample_does_not_depend_on_the_other_in_its_pack(branch, touched):
    (q, k, v, gates), lengths = make_inputs(LEAK_CASE, torch.float32)
    rows, others = [(slice(0, 120), slice(120, 195)), (slice(120, 195), slice(0, 120))][touched]
    before = run_branch(branch, [q, k, v, gates], lengths, LEAK_CASE)
    after = run_branch(branch, [perturbed(q, rows), perturbed(k, rows), perturbed(v, rows), gates], lengths, LEAK_CASE)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[rows], after[rows])


@each_branch
def test_a_packed_sample_gives_what_it_gives_alone(branch):
    tensors, lengths = make_inputs(LEAK_CASE)
    packed = run_branch(branch, tensors, lengths, LEAK_CASE)
    for rows in (slice(0, 120), slice(120, 195)):
        alone = {"cu_seqlens": offsets((rows.stop - rows.start,))}
        assert_close(packed[rows], run_branch(branch, [x[rows] for x in tensors], alone, LEAK_CASE), 1e-12)


@pytest.mark.parametrize("g", [0, 1, 2])
@each_branch
def test_a_kv_head_reaches_only_the_query_heads_of_its_group(branch, g):
    case = Case((130,), heads=6, kv_heads=3, block_count=4, window_size=20)
    (q, k, v, gates), lengths = make_inputs(case)
    before = run_branch(branch, [q, k, v, gates], lengths, case)
    k_other, v_other = perturbed(k, slice(None), g), perturbed(v, slice(None), g)
    after = run_branch(branch, [q, k_other, v_other, gates], lengths, case)
    for h in range(6):
        assert torch.equal(before[:, h], after[:, h]) == (h not in (2 * g, 2 * g + 1))


@pytest.mark.parametrize("branch, gate", [("compression", 0), ("selection", 1), ("window", 2)])
def test_each_gate_weighs_its_branch(branch, gate):
    tensors, lengths = make_inputs(WHOLE_CASE)
    gates = torch.zeros_like(tensors[3])
    gates[..., gate] = tensors[3][..., gate]
    whole = run_branch("whole", [*tensors[:3], gates], lengths, WHOLE_CASE)
    alone = run_branch(branch, tensors, lengths, WHOLE_CASE)
    assert_close(whole, gates[..., gate, None] * alone, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Lists of query heads
# ----------------------------------------------------------------------------------------------------------------------

QUERY_HEADS = [[4, 0, 2], [1], [3, 2, 1, 0]]  # of 6: some have two KV heads, one has none


@each_branch
def test_listed_query_heads_are_those_heads_gathered_for_each_kv_head(branch):
    case = Case((100, 0, 50), (60, 0, 50), heads=6, kv_heads=3, block_count=4, window_size=20)
    (q, k, v, _), lengths = make_inputs(case)
    gates = torch.rand(110, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    tensors = [q, k, v, gates]
    listed = dict(lengths, query_heads=QUERY_HEADS)

    def gathered(run):
        """`run` for each KV head with the heads of its list, as if there were no others."""
        starts = [0, 3, 4, 8]
        return [
            run(
                branch,
                [q[:, heads], k[:, g : g + 1], v[:, g : g + 1], gates[:, starts[g] : starts[g + 1]]],
                lengths,
                case,
            )
            for g, heads in enumerate(QUERY_HEADS)
        ]

    out = run_branch(branch, tensors, listed, case)
    expected = torch.cat(gathered(run_branch), 1)
    assert out.shape == (110, 8, 16)
    assert_close(out, expected, 1e-12)
    grads = gradients(out, tensors)
    for grad, wanted in zip(grads, gradients(expected, tensors), strict=True):
        assert_close(grad, wanted, 1e-12)
    assert (grads[0][:, 5] == 0).all() and (grads[0][:, :5] != 0).flatten(2).any(2).any(0).all()
    if branch != "whole":
        assert_close(run_lse(branch, tensors, listed, case), torch.cat(gathered(run_lse), 1), 1e-12)
    if branch == "selection":
        blocks = torch.cat(gathered(lambda _, *rest: choose(*rest)))
        assert torch.equal(choose(tensors, listed, case), blocks)


@each_branch
def test_listing_the_usual_query_heads_changes_nothing(branch):
    tensors, lengths = make_inputs(WHOLE_CASE)
    listed = dict(lengths, query_heads=[[0, 1], [2, 3]])
    assert_close(
        run_branch(branch, tensors, listed, WHOLE_CASE), run_branch(branch, tensors, lengths, WHOLE_CASE), 1e-12
    )


# ----------------------------------------------------------------------------------------------------------------------
# Fewer queries than keys, and chunks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, queries",
    [((150,), (1,)), ((150,), (5,)), ((160,), (16,)), ((161,), (17,)), ((100, 60, 0, 33, 20), (7, 60, 0, 0, 1))],
    ids=str,
)
@each_branch
def test_the_last_queries_of_a_stream_give_their_rows_of_the_full_call(branch, keys, queries):
    case = Case(keys, heads=4, kv_heads=2, block_count=4, window_size=20)
    (q, k, v, gates), lengths = make_inputs(case)
    last = torch.cat([torch.arange(end - m, end) for end, m in zip(offsets(keys)[1:].tolist(), queries, strict=True)])
    few, few_lengths = [q[last], k, v, gates[last]], {"cu_seqlens": offsets(queries), "cu_seqlens_k": offsets(keys)}
    full = run_branch(branch, [q, k, v, gates], lengths, case)
    assert_close(run_branch(branch, few, few_lengths, case), full[last], 1e-12)
    if branch == "selection":
        assert torch.equal(choose(few, few_lengths, case), choose([q, k, v, gates], lengths, case)[:, last])
    if branch != "whole":
        assert_close(
            run_lse(branch, few, few_lengths, case), run_lse(branch, [q, k, v, gates], lengths, case)[last], 1e-12
        )


@each_branch
def test_a_stream_read_in_pieces_gives_what_it_gives_at_once(branch):
    case = Case((150,), heads=4, kv_heads=2, block_count=4, window_size=20)
    (q, k, v, gates), lengths = make_inputs(case)
    pieces, seen = [], 0
    for m in (40, 1, 55, 16, 38):
        seen += m
        rows = slice(seen - m, seen)
        piece = {"cu_seqlens": offsets((m,)), "cu_seqlens_k": offsets((seen,))}
        pieces.append(run_branch(branch, [q[rows], k[:seen], v[:seen], gates[rows]], piece, case))
    assert_close(torch.cat(pieces), run_branch(branch, [q, k, v, gates], lengths, case), 1e-12)


@pytest.mark.parametrize(
    "max_scores, case",
    [
        (1, Case((70, 0, 9), heads=4, kv_heads=2, window_size=20)),
        (2000, Case((200, 0, 65), heads=4, kv_heads=2, block_count=4, window_size=20)),
        (2000, Case((200,), heads=7, block_size=64, block_count=3, window_size=1000)),
        (2000, Case((150, 90), (100, 33), heads=2, kv_heads=2, block_count=4, window_size=50)),
    ],
    ids=str,
)
@each_branch
def test_chunks_are_invisible(branch, max_scores, case, monkeypatch):
    tensors, lengths = make_inputs(case)
    expected = run_branch(branch, tensors, lengths, case)
    expected_grads = gradients(expected, tensors)
    blocks = choose(tensors, lengths, case)
    monkeypatch.setattr(nsa_torch, "MAX_SCORES", max_scores)
    out = run_branch(branch, tensors, lengths, case)
    assert_close(out, expected, 1e-12)
    for grad, expected_grad in zip(gradients(out, tensors), expected_grads, strict=True):
        assert_close(grad, expected_grad, 1e-12)
    assert torch.equal(choose(tensors, lengths, case), blocks)
    with torch.no_grad():
        assert torch.equal(out, run_branch(branch, tensors, lengths, case))


@each_branch
def test_a_sample_of_many_chunks_equals_brute_force(branch, monkeypatch):
    monkeypatch.setattr(nsa_torch, "MAX_SCORES", 2000)
    case = CASES[9]
    assert case.keys == (200,)
    tensors, lengths = make_inputs(case)
    out = run_branch(branch, tensors, lengths, case)
    expected, expected_grads = reference(case, branch)
    assert_close(out.detach(), expected)
    for grad, expected_grad in zip(gradients(out, tensors), expected_grads, strict=True):
        assert_close(grad, expected_grad)


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes
# ----------------------------------------------------------------------------------------------------------------------

PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)]
each_precision = pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=["float32", "bfloat16", "float16"])
LOW_PRECISION_CASE = Case((200, 33), heads=4, kv_heads=2, dim=32, block_count=4, window_size=40)


@pytest.mark.parametrize("max_scores", [None, 2000], ids=["default chunks", "tiny chunks"])
@each_precision
@each_branch
def test_low_precision_is_close_to_the_same_values_in_fp64(branch, dtype, tolerance, max_scores, monkeypatch):
    if max_scores is not None:  # gradients of k and v must not be summed over chunks in bf16
        monkeypatch.setattr(nsa_torch, "MAX_SCORES", max_scores)
    case = LOW_PRECISION_CASE
    tensors, lengths = make_inputs(case, dtype)
    blocks = choose(tensors, lengths, case)  # near-ties are the next test's business
    out = run_branch(branch, tensors, lengths, case)
    assert out.dtype == dtype
    expected, expected_grads = fp64_reference(case, branch, dtype, tuple(blocks.flatten().tolist()))
    assert relative_rms(out, expected) <= tolerance
    for x, grad, expected in zip(tensors, gradients(out, tensors), expected_grads, strict=True):
        assert grad.dtype == x.dtype
        if expected.any():
            assert relative_rms(grad, expected) <= tolerance


@cache
def fp64_reference(case, branch, dtype, blocks):
    """Brute force in fp64 over low-precision values and the blocks that were chosen in low precision."""
    tensors, lengths = make_inputs(case, dtype)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    blocks = torch.tensor(blocks, dtype=torch.int32).view(case.kv_heads, -1, case.block_count)
    out = run_branch(branch, tensors, lengths, case, Brute, blocks=blocks)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, tensors, cotangent.to(dtype).double(), allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, grads, strict=True)]


@each_precision
def test_low_precision_chooses_other_blocks_than_fp64_only_at_near_ties(dtype, tolerance):
    case = Case((250, 100), heads=4, kv_heads=2, block_count=5)
    tensors, lengths = make_inputs(case, dtype)
    blocks = choose(tensors, lengths, case).tolist()
    exact_tensors = [x.detach().double() for x in tensors]
    exact = choose(exact_tensors, lengths, case, Brute).tolist()
    importances = block_importance(*exact_tensors[:2], lengths["cu_seqlens"], None, case.block_size, case.scale)
    differing = 0
    for (g, n), importance in importances.items():
        chosen, expected = set(blocks[g][n]), set(exact[g][n])
        assert len(chosen) == len(expected)
        for j in chosen - expected:
            differing += 1
            assert importance[j] >= (1 - 1e-4) * min(importance[t] for t in expected - chosen)
    assert differing <= 2


@pytest.mark.parametrize("branch", ["compression", "selection", "window"])
@each_precision
def test_lse_is_fp32_for_low_precision_inputs(branch, dtype, tolerance):
    tensors, lengths = make_inputs(LOW_PRECISION_CASE, dtype)
    lse = run_lse(branch, tensors, lengths, LOW_PRECISION_CASE)
    expected = run_lse(branch, [x.detach().double() for x in tensors], lengths, LOW_PRECISION_CASE)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    seen = expected.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert relative_rms(lse[seen], expected[seen]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_branch
def test_autocast_changes_nothing(branch, dtype):
    tensors, lengths = make_inputs(LOW_PRECISION_CASE, dtype)
    plain = run_branch(branch, tensors, lengths, LOW_PRECISION_CASE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run_branch(branch, tensors, lengths, LOW_PRECISION_CASE)
        blocks = choose(tensors, lengths, LOW_PRECISION_CASE)
    assert inside.dtype == dtype and torch.equal(inside, plain)
    assert torch.equal(blocks, choose(tensors, lengths, LOW_PRECISION_CASE))
    for grad, expected in zip(gradients(inside, tensors), gradients(plain, tensors), strict=True):
        assert torch.equal(grad, expected)


@each_branch
def test_large_scores_neither_overflow_nor_lose_the_maximum(branch):
    case = Case((100,), heads=2, block_count=4, window_size=20, scale=100.0)
    tensors, lengths = make_inputs(case, torch.float32)
    out = run_branch(branch, tensors, lengths, case)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(out, tensors))
    blocks = choose(tensors, lengths, case)
    expected = run_branch(branch, [x.detach().double() for x in tensors], lengths, case, Brute, blocks=blocks)
    assert relative_rms(out, expected) <= 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest  # makes videonsa importable
import torch
from videonsa.nsa_torch import nsa_attention

def peak():  # of this process alone: ru_maxrss would start at the peak of the pytest process
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
n, heads, dim, train = int(sys.argv[2]), 7, 64, sys.argv[3] == "training"
def call(n):
    q, k, v = (torch.randn(n, h, dim, requires_grad=train) for h in (heads, 1, 1))
    gates = torch.rand(n, heads, 3, requires_grad=train)
    before = peak()
    out = nsa_attention(q, k, v, gates, torch.tensor([0, n], dtype=torch.int32))
    if train:
        out.sum().backward()
    return peak() - before

call(100)  # whatever the first call loads stays out of the count
print(call(n))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("n, mode, matrices", [(8192, "inference", 0.5), (6144, "training", 1.5)])
def test_memory_stays_below_that_of_all_scores(n, mode, matrices):
    # All at once, scores, masked scores and probabilities are three or more matrices, and training keeps two.
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(Path(__file__).parent), str(n), mode]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    inputs = n * (7 + 2) * 64 * 4  # bytes of q, k and v
    assert int(result.stdout) < matrices * (n * n * 7 * 4) + 4 * inputs


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "nsa_attention": "q k v gates cu_seqlens cu_seqlens_k query_heads block_size block_count window_size",
    "compressed_attention": "q k v cu_seqlens cu_seqlens_k query_heads block_size",
    "select_blocks": "q k lse cu_seqlens cu_seqlens_k query_heads block_size block_count",
    "selected_attention": "q k v blocks cu_seqlens cu_seqlens_k query_heads block_size",
    "window_attention": "q k v cu_seqlens cu_seqlens_k query_heads window_size",
}
each_function = pytest.mark.parametrize("function", ARGUMENTS)


def each_function_with(argument):
    return pytest.mark.parametrize("function", [name for name, names in ARGUMENTS.items() if argument in names.split()])


def call(function, **changes):
    """The function on two samples of 20 and 10 tokens, H = 4, G = 2, D = 8, with some arguments replaced."""
    arguments = {
        "q": torch.zeros(30, 4, 8),
        "k": torch.zeros(30, 2, 8),
        "v": torch.zeros(30, 2, 8),
        "gates": torch.zeros(30, 4, 3),
        "lse": torch.zeros(30, 4),
        "blocks": torch.zeros(2, 30, 3, dtype=torch.int32),
        "cu_seqlens": offsets((20, 10)),
        "cu_seqlens_k": None,
        "query_heads": None,
        "block_size": 16,
        "block_count": 3,
        "window_size": 8,
    }
    arguments.update(changes)
    return getattr(nsa_torch, function)(**{name: arguments[name] for name in ARGUMENTS[function].split()})


@each_function
def test_valid_arguments_raise_nothing(function):
    call(function, cu_seqlens_k=offsets((20, 10)))
    call(function, block_size=64, block_count=100, window_size=1000)


@pytest.mark.parametrize("block_size", [8, 24, 0, -16, 1])
@each_function_with("block_size")
def test_block_size_must_be_a_power_of_two_from_16(function, block_size):
    with pytest.raises(ValueError, match="block_size"):
        call(function, block_size=block_size)


@pytest.mark.parametrize("block_count", [2, 0, -1])
@each_function_with("block_count")
def test_block_count_must_be_3_or_more(function, block_count):
    with pytest.raises(ValueError, match="block_count"):
        call(function, block_count=block_count)


@pytest.mark.parametrize("window_size", [0, -1])
@each_function_with("window_size")
def test_window_size_must_be_1_or_more(function, window_size):
    with pytest.raises(ValueError, match="window_size"):
        call(function, window_size=window_size)


@each_function
def test_query_heads_must_be_a_multiple_of_kv_heads(function):
    with pytest.raises(ValueError, match=r"\bq\b|heads"):
        call(function, q=torch.zeros(30, 3, 8), gates=torch.zeros(30, 3, 3), lse=torch.zeros(30, 3))


@pytest.mark.parametrize(
    "query_heads",
    [[[0, 1]], [[0], [1], [2]], [[0, 1], []], [[0], [4]], [[0], [-1]], [[0], [1.0]], []],
    ids=str,
)
@each_function
def test_query_heads_must_be_heads_for_each_kv_head(function, query_heads):
    with pytest.raises(ValueError, match="query_heads"):
        call(function, query_heads=query_heads)


@each_function_with("gates")
def test_gates_need_a_row_for_each_listed_query_head(function):
    call(function, gates=torch.zeros(30, 3, 3), query_heads=[[0, 2], [2]])
    with pytest.raises(ValueError, match="gates"):
        call(function, query_heads=[[0, 2], [2]])


@each_function_with("lse")
def test_lse_needs_a_row_for_each_listed_query_head(function):
    call(function, lse=torch.zeros(30, 3), query_heads=[[0, 2], [2]])
    with pytest.raises(ValueError, match="lse"):
        call(function, query_heads=[[0, 2], [2]])


MISMATCHES = [
    {"q": torch.zeros(30, 4, 16)},
    {"q": torch.zeros(30, 32)},
    {"k": torch.zeros(30, 16)},
    {"k": torch.zeros(30, 2, 16), "v": torch.zeros(30, 2, 16)},
    {"v": torch.zeros(30, 2, 16)},
    {"v": torch.zeros(30, 4, 8)},
    {"v": torch.zeros(29, 2, 8)},
    {"q": torch.zeros(30, 4, 8, dtype=torch.float64)},
    {"k": torch.zeros(30, 2, 8, dtype=torch.bfloat16)},
    {"v": torch.zeros(30, 2, 8, dtype=torch.float64)},
    {"k": torch.zeros(30, 2, 8, device="meta")},
    {"v": torch.zeros(30, 2, 8, device="meta")},
]


@pytest.mark.parametrize(
    "function, changes",
    [(f, changes) for f in ARGUMENTS for changes in MISMATCHES if set(changes) & set(ARGUMENTS[f].split())],
    ids=lambda x: (
        x if isinstance(x, str) else ",".join(f"{n} {list(t.shape)} {t.dtype} {t.device}" for n, t in x.items())
    ),
)
def test_q_k_and_v_must_agree_in_shape_dtype_and_device(function, changes):
    with pytest.raises(ValueError, match=rf"\b({'|'.join(changes)})\b"):
        call(function, **changes)


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([0, 20, 30]),
        torch.tensor([0.0, 20.0, 30.0]),
        offsets((20, 10)) + 1,
        torch.tensor([5, 20, 30], dtype=torch.int32),
        torch.tensor([0, 25, 20, 30], dtype=torch.int32),
        torch.tensor([0, 40, 30], dtype=torch.int32),
        torch.tensor([0, 20, 29], dtype=torch.int32),
        torch.tensor([0, 20, 31], dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([[0, 20, 30]], dtype=torch.int32),
    ],
    ids=lambda x: f"{x.tolist()} {x.dtype}",
)
@each_function
def test_cu_seqlens_must_be_int32_and_rise_from_zero_to_the_number_of_tokens(function, cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens\b"):
        call(function, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    "cu_seqlens_k",
    [
        torch.tensor([0, 20, 30]),
        torch.tensor([5, 20, 30], dtype=torch.int32),
        torch.tensor([0, 40, 30], dtype=torch.int32),
        torch.tensor([0, 20, 29], dtype=torch.int32),
        torch.tensor([0, 30], dtype=torch.int32),
        torch.tensor([0, 20, 30, 30], dtype=torch.int32),
        torch.tensor([0, 15, 30], dtype=torch.int32),  # fewer keys than queries in the first sample
    ],
    ids=lambda x: f"{x.tolist()} {x.dtype}",
)
@each_function
def test_cu_seqlens_k_must_match_the_keys_and_hold_every_query(function, cu_seqlens_k):
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        call(function, cu_seqlens_k=cu_seqlens_k)


@each_function
def test_more_keys_than_queries_need_cu_seqlens_k(function):
    with pytest.raises(ValueError, match=r"cu_seqlens|\bk\b"):
        call(function, k=torch.zeros(40, 2, 8), v=torch.zeros(40, 2, 8))
    call(function, k=torch.zeros(40, 2, 8), v=torch.zeros(40, 2, 8), cu_seqlens_k=offsets((25, 15)))


@pytest.mark.parametrize("shape", [(30, 4, 2), (30, 4), (29, 4, 3), (30, 2, 3), (4, 30, 3)], ids=str)
def test_gates_must_be_three_per_query_head(shape):
    with pytest.raises(ValueError, match="gates"):
        call("nsa_attention", gates=torch.zeros(shape))


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 30, 3), torch.int64),
        ((2, 30, 3), torch.float32),
        ((30, 2, 3), torch.int32),
        ((2, 29, 3), torch.int32),
        ((4, 30, 3), torch.int32),
        ((2, 30), torch.int32),
    ],
    ids=str,
)
def test_blocks_must_be_int32_per_kv_head_and_query(shape, dtype):
    with pytest.raises(ValueError, match="blocks"):
        call("selected_attention", blocks=torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 29), (30, 2), (4, 30)], ids=str)
def test_the_importance_of_own_blocks_needs_a_value_for_each_kv_head_and_query(shape):
    q, k, lse = torch.zeros(30, 4, 16), torch.zeros(30, 2, 16), torch.zeros(30, 4)
    with pytest.raises(ValueError, match="own_importance"):
        nsa_torch.select_blocks(q, k, lse, offsets((20, 10)), own_importance=torch.zeros(shape))


@pytest.mark.parametrize(("first", "means", "name"), [(-1, 1, "first"), (34, 3, "k"), (33, 4, "k")])
def test_given_means_must_be_as_many_as_the_last_query_sees(first, means, name):
    q, k = torch.zeros(30, 4, 16), torch.zeros(means, 2, 16)
    with pytest.raises(ValueError, match=rf"^{name} must"):
        nsa_torch.pooled_attention(q, k, k, first=first, block_size=16)
