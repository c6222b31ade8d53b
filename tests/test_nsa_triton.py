"""The kernels against nsa_torch in fp64: on a GPU natively, elsewhere in triton's interpreter with bounds checked; and
what ptxas makes of them for GPUs that are not here. The interpreter takes seconds per case, so cases do much at once.
"""

import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import offline
import pytest
import torch

from videonsa import nsa_torch, nsa_triton

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-3}  # relative RMS
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter, or about devices")

# lengths of the samples, query heads, KV heads, head dim, block size, block count, window, dtype[, lengths of the keys]
SMALL = {
    "group 7, lengths 1, 63, 0, 65, packed": ([1, 63, 0, 65], 14, 2, 16, 16, 3, 20, torch.float32),
    "group 7, bf16, dim 128, as the 7B": ([150], 7, 1, 128, 64, 32, 256, torch.bfloat16),
    "group 7, bf16, blocks chosen": ([200], 7, 1, 32, 16, 5, 64, torch.bfloat16),
    "group 1, dim 80, window 1, blocks of 32": ([64, 130], 2, 2, 80, 32, 3, 1, torch.float32),
    "group 16, dim 96, fewer queries than keys": ([5, 16], 16, 1, 96, 16, 4, 30, torch.float32, [150, 16]),
    "group 2, fp16, dim 64, one query of a long stream": ([1], 4, 2, 64, 16, 3, 7, torch.float16, [333]),
    "group 4, blocks of 128, window beyond the sample": ([140], 4, 1, 32, 128, 3, 500, torch.bfloat16),
}
LARGE = {
    "7B, bf16": ([4096, 1, 63, 64, 65, 5000], 28, 4, 128, 64, 32, 256, torch.bfloat16),
    "7B, fp16": ([3000], 28, 4, 128, 64, 8, 256, torch.float16),
    "7B, fp32": ([2500, 700], 28, 4, 128, 64, 8, 256, torch.float32),
    "group 1": ([2000], 4, 4, 64, 32, 16, 100, torch.bfloat16),
    "group 2": ([2000], 8, 4, 80, 16, 40, 100, torch.bfloat16),
    "group 4": ([2000], 16, 4, 96, 128, 5, 100, torch.bfloat16),
    "group 16": ([2000], 32, 2, 128, 64, 16, 100, torch.bfloat16),
    "dim 16, chunks": ([77, 10], 7, 1, 16, 16, 7, 33, torch.bfloat16, [5000, 10]),
}
CASES = [pytest.param(case, id=name) for name, case in SMALL.items()]
CASES += [pytest.param(case, id=f"large: {name}", marks=needs_gpu) for name, case in LARGE.items()]


def inputs(lengths, heads, groups, dim, block_size, block_count, window_size, dtype, lengths_k=None, size=1.0):
    """q, k, v, gates, and the options of nsa_attention; queries follow their keys, so that choices are decided."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(n), h, dim, generator=generator)
        for n, h in ((lengths, heads), (lengths_k or lengths, groups), (lengths_k or lengths, groups))
    )
    gates = torch.rand(sum(lengths), heads, 3, generator=generator)
    cu_seqlens, cu_seqlens_k = (
        torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=DEVICE) for n in (lengths, lengths_k or lengths)
    )
    tensors = [x.to(DEVICE, dtype) for x in (q * size, k * size, v, gates)]
    options = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    return tensors, cu_seqlens, cu_seqlens_k if lengths_k else None, options


def relative_rms(x, reference):
    return float((x.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def assert_close(x, reference, tolerance):
    assert x.isfinite().all()
    assert relative_rms(x, reference) <= tolerance


def assert_lse_close(lse, reference, tolerance):
    assert lse.dtype == torch.float32
    seen = reference.isfinite()
    assert torch.equal(lse == -torch.inf, ~seen)
    assert seen.sum() == 0 or (lse[seen].double() - reference[seen]).abs().max() <= tolerance


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs and workspaces start as NaN or far-off indices, so that what is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(x):
        return x.fill_(torch.nan if x.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


@pytest.mark.parametrize("case", CASES)
def test_every_branch_equals_the_torch_path_in_fp64(case):
    (q, k, v, gates), cu, cu_k, options = inputs(*case)
    doubles = [x.double() for x in (q, k, v)]
    tolerance = TOLERANCE[q.dtype]
    lengths, size = {"cu_seqlens_k": cu_k}, {"block_size": options["block_size"]}

    o, lse = nsa_triton.compressed_attention(q, k, v, cu, **lengths, **size)
    reference, reference_lse = nsa_torch.compressed_attention(*doubles, cu, **lengths, **size)
    assert_close(o, reference, tolerance)
    assert_lse_close(lse, reference_lse, 1e-2 if q.dtype != torch.float32 else 1e-5)

    chosen = options["block_count"]
    blocks = nsa_triton.select_blocks(q, k, lse, cu, **lengths, **size, block_count=chosen)
    best = nsa_torch.select_blocks(*doubles[:2], reference_lse, cu, **lengths, **size, block_count=chosen)
    assert blocks.dtype == torch.int32
    different = (blocks != best).any(-1).float().mean()
    assert different == 0 if q.dtype == torch.float32 else different < 0.05  # means are rounded to the dtype of k

    o, lse = nsa_triton.selected_attention(q, k, v, best, cu, **lengths, **size)
    reference, reference_lse = nsa_torch.selected_attention(*doubles, best, cu, **lengths, **size)
    assert_close(o, reference, tolerance)
    assert_lse_close(lse, reference_lse, 1e-4 if q.dtype != torch.float32 else 1e-5)

    window = {"window_size": options["window_size"]}
    o, lse = nsa_triton.window_attention(q, k, v, cu, **lengths, **window)
    reference, reference_lse = nsa_torch.window_attention(*doubles, cu, **lengths, **window)
    assert_close(o, reference, tolerance)
    assert_lse_close(lse, reference_lse, 1e-4 if q.dtype != torch.float32 else 1e-5)

    # The whole: with the kernels' own choice of blocks, since one near tie decided otherwise is no error.
    out = nsa_triton.nsa_attention(q, k, v, gates, cu, **lengths, **options)
    branches = (
        nsa_torch.compressed_attention(*doubles, cu, **lengths, **size)[0],
        nsa_torch.selected_attention(*doubles, blocks, cu, **lengths, **size)[0],
        nsa_torch.window_attention(*doubles, cu, **lengths, **window)[0],
    )
    assert_close(out, sum(gates.double()[..., b, None] * o for b, o in enumerate(branches)), tolerance)


def test_large_logits_neither_overflow_nor_lose_the_largest():
    (q, k, v, gates), cu, _, options = inputs([70], 7, 1, 32, 16, 3, 9, torch.float32, size=9.0)
    assert (q[:, 0] @ k[:, 0].T).abs().max() * 32**-0.5 > 150
    out = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    reference = nsa_torch.nsa_attention(*(x.double() for x in (q, k, v, gates)), cu, **options)
    assert_close(out, reference, 1e-4)


def test_ties_go_to_the_lower_block():
    (q, k, v, gates), cu, _, options = inputs([150], 7, 1, 16, 16, 5, 9, torch.float32)
    q = torch.zeros_like(q)  # all blocks are equally important
    _, lse = nsa_triton.compressed_attention(q, k, v, cu, block_size=16)
    blocks = nsa_triton.select_blocks(q, k, lse, cu, block_size=16, block_count=5)
    assert blocks[0, 149].tolist() == [0, 1, 2, 8, 9]
    assert blocks[0, 40].tolist() == [0, 1, 2, -1, -1]


def test_importance_in_chunks_changes_nothing(monkeypatch):
    (q, k, v, gates), cu, _, options = inputs([100, 90], 7, 1, 16, 16, 3, 9, torch.float32)
    whole = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    monkeypatch.setattr(nsa_triton, "MAX_IMPORTANCE", 1)
    assert torch.equal(nsa_triton.nsa_attention(q, k, v, gates, cu, **options), whole)


@pytest.mark.parametrize("changed", [0, 31, 64])
def test_later_tokens_leave_earlier_outputs_bit_identical(changed):
    (q, k, v, gates), cu, _, options = inputs([20, 70], 7, 1, 16, 16, 3, 9, torch.float32)
    before = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    for x in (q, k, v):
        x[20 + changed] += 1.0
    after = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    assert torch.equal(before[: 20 + changed], after[: 20 + changed])
    assert not torch.equal(before[20 + changed :], after[20 + changed :])


def test_two_runs_are_bit_identical_and_inputs_need_not_be_contiguous():
    (q, k, v, gates), cu, _, options = inputs([70], 7, 1, 16, 16, 3, 9, torch.bfloat16)
    first = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, gates)]
    assert torch.equal(nsa_triton.nsa_attention(*strided, cu, **options), first)


def test_no_queries_give_no_output():
    (q, k, v, gates), _, _, options = inputs([0], 7, 1, 16, 16, 3, 9, torch.float32)
    cu = torch.tensor([0, 0], dtype=torch.int32, device=DEVICE)
    assert nsa_triton.nsa_attention(q, k, v, gates, cu, **options).shape == (0, 7, 16)


def test_what_the_kernels_cannot_do_is_an_error():
    (q, k, v, gates), cu, _, options = inputs([20], 7, 1, 16, 16, 3, 9, torch.float32)
    with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
        nsa_triton.window_attention(q.double(), k.double(), v.double(), cu)
    with pytest.raises(ValueError, match="block_size"):
        nsa_triton.nsa_attention(q, k, v, gates, cu, block_size=24)
    with pytest.raises(NotImplementedError, match="no backward"):
        nsa_triton.nsa_attention(q.requires_grad_(), k, v, gates, cu, **options)
    assert not nsa_triton.available(q)  # on a CPU, and with a gradient to come anywhere


@needs_gpu
def test_offsets_beyond_two_to_the_31_are_right():
    n, heads = 700_000, 28  # 2.5e9 elements of q
    q = torch.randn(n, heads, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(n, 4, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    cu = torch.tensor([0, n], dtype=torch.int32, device=DEVICE)
    o, _ = nsa_triton.window_attention(q, k, v, cu)
    tail = torch.tensor([0, 100], dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([0, 400], dtype=torch.int32, device=DEVICE)
    few, _ = nsa_triton.window_attention(q[-100:], k[-400:], v[-400:], tail, cu_seqlens_k=keys)
    assert relative_rms(o[-100:], few.double()) < 1e-2


@needs_gpu
def test_a_cuda_graph_replays_the_call_on_new_inputs():
    (q, k, v, gates), cu, _, options = inputs([1000], 28, 4, 128, 64, 8, 256, torch.bfloat16)
    for _ in range(3):
        expected = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nsa_triton.nsa_attention(q, k, v, gates, cu, **options)
    graph.replay()
    assert torch.equal(out, expected)


@needs_gpu
def test_workspace_at_128k_stays_below_one_gigabyte():
    n = 131072
    q = torch.randn(n, 28, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(n, 4, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    gates = torch.rand(n, 28, 3, device=DEVICE, dtype=torch.bfloat16)
    cu = torch.tensor([0, n], dtype=torch.int32, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nsa_triton.nsa_attention(q, k, v, gates, cu)
    branches = 3 * q.nbytes  # what the three branches give
    assert torch.cuda.max_memory_allocated() - before - branches < 1e9


@pytest.fixture(scope="module", params=[80, 89, 90], ids="sm_{}".format)
def compiled(request):
    """(compute capability, rows of offline.py)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(offline.__file__)
    done = subprocess.run(
        [sys.executable, script, str(request.param)], env=environment, cwd=script.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_all_kernels_compile_without_spilling_and_fit(compiled):
    capability, rows = compiled
    assert {row["case"] for row in rows} == set(offline.CASES)
    assert {row["kernel"] for row in rows} == {name for name in vars(nsa_triton) if name.endswith("_kernel")}
    for row in rows:
        spilled = 0 if capability == 90 else 8  # elsewhere a few words, outside of the loops
        assert row["spills"] <= spilled and row["stack"] <= 4 * spilled, row
        assert row["shared"] <= offline.SHARED_MEMORY[capability], row


def test_dots_use_wgmma_where_meant_and_do_not_wait_for_each_other(compiled):
    capability, rows = compiled
    dots = {"_compressed_kernel": 2, "_selected_kernel": 2, "_window_kernel": 2, "_importance_kernel": 1}
    for row in rows:
        if capability == 90 and row["case"].startswith("7B bf16") and row["kernel"] in dots:
            assert row["wgmma"] and row["arrivals"], row
            assert max(row["arrivals"]) <= dots[row["kernel"]], row
        if capability < 90:
            assert row["wgmma"] == 0


def test_the_file_can_be_imported_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import conftest, torch; from videonsa import nsa_triton;"
        "x = torch.zeros(1, 1, 16); assert not nsa_triton.available(x);"
        "nsa_triton.window_attention(x, x, x, torch.tensor([0, 1], dtype=torch.int32))"
    )
    folder = Path(offline.__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert "nsa_triton needs triton" in done.stderr
