"""nsa_torch.py over caches and in chunks, in each dtype, and in bounded memory."""

from functools import cache
from pathlib import Path

import forks
import pytest
import torch
from brute import (
    CASES,
    Brute,
    Case,
    assert_close,
    block_importance,
    choose,
    each_branch,
    gradients,
    make_inputs,
    offsets,
    reference,
    relative_rms,
    run_branch,
    run_lse,
)

from videonsa import nsa_softmax, nsa_torch

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
    monkeypatch.setattr(nsa_softmax, "MAX_SCORES_CPU", max_scores)
    out = run_branch(branch, tensors, lengths, case)
    assert_close(out, expected, 1e-12)
    for grad, expected_grad in zip(gradients(out, tensors), expected_grads, strict=True):
        assert_close(grad, expected_grad, 1e-12)
    assert torch.equal(choose(tensors, lengths, case), blocks)
    with torch.no_grad():
        assert torch.equal(out, run_branch(branch, tensors, lengths, case))


@each_branch
def test_a_sample_of_many_chunks_equals_brute_force(branch, monkeypatch):
    monkeypatch.setattr(nsa_softmax, "MAX_SCORES_CPU", 2000)
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
        monkeypatch.setattr(nsa_softmax, "MAX_SCORES_CPU", max_scores)
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
    if branch == "whole":
        # It has an lse of its own, and rounding decides where each head is sure of another block: all are then worth 1.
        q, k = (x.detach() for x in tensors[:2])
        chosen = nsa_torch.choose(q, k, block_size=case.block_size, block_count=case.block_count, scale=case.scale)
        blocks = torch.arange(chosen.shape[-1]).where(chosen, -1).int()
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
@pytest.mark.parametrize("n, mode, matrices", [(4096, "inference", 0.5), (3072, "training", 1.5)])
def test_memory_stays_below_that_of_all_scores(n, mode, matrices):
    # All at once, scores, masked scores and probabilities are three or more matrices, and training keeps two.
    result = forks.run("-c", MEMORY_SCRIPT, Path(__file__).parent, n, mode)
    assert result.returncode == 0, result.stderr
    inputs = n * (7 + 2) * 64 * 4  # bytes of q, k and v
    assert int(result.stdout) < matrices * (n * n * 7 * 4) + 4 * inputs
