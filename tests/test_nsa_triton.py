"""What the functions of nsa_triton.py promise beyond the right values, which test_kernel_branches.py compares: on a GPU
natively, elsewhere in triton's interpreter with bounds checked and programs kept apart.
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    DEVICE,
    assert_all_equal,
    assert_close,
    assert_gradients_close,
    assert_lse_close,
    backend,
    cotangent,
    gradients,
    inputs,
    needs_gpu,
    relative_rms,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from videonsa import nsa_launches, nsa_released, nsa_torch, nsa_triton
from videonsa.nsa_kernels import NUMBERS, VIEWS

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("larger_tiles", "poison")

TINY = ([30, 25], 2, 1, 16, 16, 3, 9, torch.float32)  # where one case is enough


@pytest.fixture
def launches(monkeypatch):
    """(name of the kernel, grid) of each launch."""
    done, launch = [], nsa_launches.Launches.launch

    def record(self, kernel, grid, **arguments):
        done.append((kernel.fn.__name__, grid))
        launch(self, kernel, grid, **arguments)

    monkeypatch.setattr(nsa_launches.Launches, "launch", record)
    return done


def test_the_own_block_can_be_given_an_importance_instead_of_a_place():
    (q, k, _, _), cu, _, options = inputs([30, 150, 90], 4, 2, 16, 16, 4, 1, torch.float32)
    del options["window_size"]
    lse = torch.randn(270, 4, device=DEVICE)  # any: it need not be that of the keys
    own = 4 * torch.rand(2, 270, device=DEVICE)
    own[:, ::50] = 0
    own[:, 1::50] = torch.inf
    blocks = nsa_triton.select_blocks(q, k, lse, cu, own_importance=own, **options)
    assert torch.equal(blocks, nsa_torch.select_blocks(q, k, lse, cu, own_importance=own, **options))
    assert not torch.equal(blocks, nsa_triton.select_blocks(q, k, lse, cu, **options))


@pytest.mark.backend
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the interpreter, where masked
def test_large_logits_neither_overflow_nor_lose_the_largest():
    tensors, cu, _, options = inputs([70], 3, 1, 32, 16, 3, 9, torch.float32, size=10.0)
    q, k = tensors[:2]
    assert (q[:, 0] @ k[:, 0].T).abs().max() * 32**-0.5 > 200
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    out, reference = backend.nsa_attention(*tensors, cu, **options), nsa_torch.nsa_attention(*doubles, cu, **options)
    assert_close(out, reference, 1e-4)
    assert_gradients_close(out, tensors, reference, doubles, 1e-4)


@pytest.mark.backend
def test_ties_go_to_the_lower_block():
    (q, k, v, _), cu, _, _ = inputs([150], 2, 1, 16, 16, 5, 9, torch.float32)
    q = torch.zeros_like(q)  # all blocks are equally important
    _, lse = backend.compressed_attention(q, k, v, cu, block_size=16)
    blocks = backend.select_blocks(q, k, lse, cu, block_size=16, block_count=5)
    assert blocks[0, 149].tolist() == [0, 1, 2, 8, 9]
    assert blocks[0, 40].tolist() == [0, 1, 2, -1, -1]


@pytest.mark.backend
def test_any_blocks_can_be_given():
    """Repeated, in any order, after the query, beyond the sample, none at all."""
    (q, k, v, _), cu, _, _ = inputs([37, 20], 4, 2, 16, 16, 3, 9, torch.float32)
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(-2, 7, (2, len(q), 6), generator=generator).to(DEVICE, torch.int32)
    blocks[0, 5], blocks[:, 50], blocks[:, 9, 3] = 0, -1, 2**31 - 1
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o, lse = backend.selected_attention(q, k, v, blocks, cu, block_size=16)
    reference, reference_lse = nsa_torch.selected_attention(*doubles, blocks, cu, block_size=16)
    assert (o[50] == 0).all() and (lse[50] == -torch.inf).all()
    assert_close(o, reference, 1e-5)
    assert_lse_close(lse, reference_lse, 1e-5)
    assert_gradients_close(o, (q, k, v), reference, doubles)


def test_thousands_of_blocks_before_a_few_queries(monkeypatch):
    """As after hours of video. A program per block takes the interpreter too long: means are given, and dk and dv of
    the selection, which are added up block by block, are left to the large case of the same sizes, on a GPU."""
    blocks, size = 4_100, 16
    (q, k, v, _), cu, cu_k, _ = inputs([3], 2, 1, 16, size, 5, 9, torch.float32, [size * blocks])
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    means, double_means = ([x.detach().view(blocks, size, 1, 16).mean(1) for x in y[1:]] for y in ((q, k, v), doubles))
    for x in (*means, *double_means):
        x.requires_grad_()
    first = {"first": blocks * size - 3, "block_size": size}
    o, lse = nsa_triton.pooled_attention(q, *means, **first)
    expected, expected_lse = nsa_released.pooled_attention(doubles[0], *double_means, **first)
    assert_close(o, expected, 1e-5)
    assert_gradients_close(o, (q, *means), expected, (doubles[0], *double_means))

    monkeypatch.setattr(nsa_launches.Launches, "means", [x.detach() for x in means])
    options = {"cu_seqlens_k": cu_k, "block_size": size}
    chosen = nsa_triton.select_blocks(q, k, lse, cu, block_count=5, **options)
    assert torch.equal(chosen, nsa_torch.select_blocks(*doubles[:2], expected_lse, cu, block_count=5, **options))
    assert len(chosen.unique()) > 5 and chosen.max() == blocks - 1
    o, _ = nsa_triton.selected_attention(q, k.detach(), v.detach(), chosen, cu, **options)
    expected, _ = nsa_torch.selected_attention(*doubles, chosen, cu, **options)
    assert_close(o, expected, 1e-5)
    assert_gradients_close(o, (q,), expected, doubles[:1])


@pytest.mark.parametrize(("tokens", "number"), [(2048, 4), (2049, 7), (8192, 7), (131072, 39)])
def test_launches_of_a_forward_pass_are_few(tokens, number, monkeypatch):
    """Means, compression, selection, window; the union and, for each chunk of tiles, importance and choice, if there
    are more blocks than a query chooses."""
    names = []
    monkeypatch.setattr(nsa_launches.Launches, "launch", lambda self, kernel, *_, **__: names.append(kernel))
    q, k = (torch.empty(tokens, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (28, 4))
    cu = torch.empty(2, dtype=torch.int32, device="meta")
    gates = torch.empty(tokens, 28, 3, dtype=torch.bfloat16, device="meta")
    sizes = {"block_size": 64, "block_count": 32, "window_size": 256, "scale": None}
    nsa_triton._attend_gated._init_fn(q, k, k, gates, cu, cu, **sizes, save=False)
    assert len(names) == number


def test_kernels_are_not_compiled_again_for_another_length(monkeypatch):
    """Numbers are those that Triton does not specialise, or multiples of 16; what it does is the same at any length."""

    def record(self, kernel, grid, **arguments):
        values = {name: x for name, x in (self.common | arguments).items() if name in kernel.arg_names}
        told = kernel.kwargs if DEVICE == "cpu" else vars(kernel)
        assert told["do_not_specialize"] == NUMBERS and told["do_not_specialize_on_alignment"] == VIEWS
        fixed = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
        for name, x in values.items():
            assert type(x) is not int or name in fixed or name in NUMBERS or (x > 0 and x % 16 == 0), name
        kinds = {name: x if name in fixed else type(x) for name, x in values.items() if name not in NUMBERS}
        found.setdefault(tokens, []).append((kernel.fn.__name__, kinds))

    monkeypatch.setattr(nsa_launches.Launches, "launch", record)
    found, sizes = {}, {"block_size": 64, "window_size": 256, "scale": None}
    for tokens in (1025, 1040, 2000, 4097, 5008, 8000):
        q, k, gates = (torch.empty(tokens, *size, device="meta") for size in ((28, 128), (4, 128), (28, 3)))
        cu = torch.empty(2, dtype=torch.int32, device="meta")
        results = nsa_triton._attend_gated._init_fn(q, k, k, gates, cu, cu, **sizes, block_count=32, save=True)
        settings = {**sizes, "branches": [*nsa_launches.BRANCHES], "reverse": False, "need_q": True, "need_kv": True}
        arguments = (results[0], None, *results[1:3], q, k, k, gates, results[3], None, cu, cu)
        nsa_triton._attend_backward._init_fn(*arguments, **settings)
    short, long = [found[n] for n in (1025, 1040, 2000)], [found[n] for n in (4097, 5008, 8000)]
    assert all(x == short[0] for x in short) and all(x == long[0] for x in long)


def test_importance_in_chunks_changes_nothing(launches, monkeypatch):
    (q, k, v, _), cu, cu_k, _ = inputs([200, 40], 2, 2, 16, 16, 3, 9, torch.float32, [200, 340])
    options = {"cu_seqlens_k": cu_k, "block_size": 16}
    _, lse = nsa_triton.compressed_attention(q, k, v, cu, **options)
    whole = nsa_triton.select_blocks(q, k, lse, cu, **options, block_count=4)
    for tiles in (1, 3):
        monkeypatch.setattr(nsa_launches, "MAX_IMPORTANCE", tiles * 2 * 32 * 48)  # KV heads, queries, blocks
        launches.clear()
        assert torch.equal(nsa_triton.select_blocks(q, k, lse, cu, **options, block_count=4), whole)
        assert len(launches) == 1 + 2 * -(-9 // tiles)  # 9 tiles


def test_how_sums_are_split_changes_gradients_by_rounding_alone(launches, monkeypatch):
    tensors, cu, _, options = inputs([100, 40], 2, 2, 16, 16, 4, 9, torch.float32)

    q, k, v, gates = tensors
    out = nsa_triton.nsa_attention(q.detach(), k, v, gates.detach(), cu, **options)

    def run():
        """dk and dv, and the grids of three kernels."""
        launches.clear()
        grads = gradients(out, (k, v), retain_graph=True)
        kernels = "band_dkv_kernel", "selected_dkv_kernel", "collect_kernel"
        return grads, *([grid for name, grid in launches if name == kernel] for kernel in kernels)

    grads, bands, pieces, collections = run()
    assert bands[0][2] > 1 and len(collections) == 1  # the queries of the compression are split
    monkeypatch.setattr(nsa_launches, "MAX_PARTIAL", 1)
    by_head, _, _, collections = run()
    assert len(collections) == 2  # KV head by KV head
    assert_all_equal(by_head, grads)
    monkeypatch.setattr(nsa_launches, "MAX_LIST", 32)
    monkeypatch.setattr(nsa_launches, "MIN_PROGRAMS", 1)
    split, bands, more_pieces, _ = run()
    assert bands[0][2] == 1 and more_pieces[0][0] > pieces[0][0]
    for grad, expected in zip(split, grads, strict=True):
        assert_close(grad, expected.double(), 1e-6)


@pytest.mark.backend
def test_later_tokens_change_nothing_earlier():
    """Neither outputs, bit by bit, nor do gradients of outputs reach what comes after them."""
    lengths, changes = [16, 50, 66], [0, 31, 48]  # a token of each sample
    tensors, cu, _, options = inputs(lengths, 2, 1, 16, 16, 3, 9, torch.float32)
    token, sample = (
        torch.cat([torch.arange(n) for n in lengths]),
        torch.arange(3).repeat_interleave(torch.tensor(lengths)),
    )
    changed = torch.tensor(changes)[sample]
    earlier = (token < changed).to(DEVICE)
    before = backend.nsa_attention(*tensors, cu, **options)
    grads = torch.autograd.grad(before, tensors, cotangent(before) * earlier[:, None, None])
    for grad in grads:
        assert (grad[~earlier] == 0).all() and (grad[earlier] != 0).any()
    moved = [x.detach() + (token == changed).to(DEVICE)[:, None, None] for x in tensors[:3]]
    after = backend.nsa_attention(*moved, tensors[3], cu, **options)
    assert torch.equal(before[earlier], after[earlier])
    assert not torch.equal(before[~earlier], after[~earlier])


@pytest.mark.backend
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_what_is_not_a_number_stays_in_its_row_and_sample():
    (q, k, v, gates), cu, _, _ = inputs([90, 100, 90], 2, 1, 16, 16, 3, 9, torch.float32)
    options = {"block_size": 16, "block_count": 4, "window_size": 9}
    expected = backend.nsa_attention(q, k, v, gates, cu, **options)
    with torch.no_grad():
        q.view(torch.int32)[-1], k[150] = 0x7FFFFFFF, torch.inf  # the NaN that GPUs give
    out = backend.nsa_attention(q, k, v, gates, cu, **options)
    assert out[-1].isnan().all()
    assert torch.equal(out[:90], expected[:90]) and torch.equal(out[190:-1], expected[190:-1])


def test_two_runs_are_bit_identical_and_inputs_need_not_be_contiguous():
    tensors, cu, _, options = inputs([20, 50], 3, 1, 16, 16, 3, 9, torch.bfloat16)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    first, second = (nsa_triton.nsa_attention(*x, cu, **options) for x in (tensors, strided))
    assert torch.equal(first, second)
    d_out = cotangent(first)[:, :1, :1].expand(first.shape)  # of stride 0, as that of a sum
    expected = torch.autograd.grad(first, tensors, d_out.contiguous())
    assert_all_equal(torch.autograd.grad(second, tensors, d_out), expected)


@pytest.mark.backend
def test_one_tensor_can_be_query_key_and_value():
    tensors, cu, _, options = inputs([60], 2, 2, 16, 16, 3, 9, torch.float32)
    x, gates = tensors[0], tensors[3]
    doubles = [y.detach().double().requires_grad_() for y in (x, gates)]
    out = backend.nsa_attention(x, x, x, gates, cu, **options)
    reference = nsa_torch.nsa_attention(*doubles[:1] * 3, doubles[1], cu, **options)
    assert_gradients_close(out, (x, gates), reference, doubles)


DQ = {"dots_kernel", "means_kernel", "band_dq_kernel"}
DKV = {"dots_kernel", "means_kernel", "band_dkv_kernel", "collect_kernel"}


@pytest.mark.parametrize("tokens", [48, 49])
def test_what_is_frozen_costs_nothing(launches, tokens):
    """Nor does the choice of blocks, where all are chosen."""
    tensors, cu, _, options = inputs([tokens], 2, 1, 16, 16, 3, 9, torch.float32)
    expected = gradients(nsa_triton.nsa_attention(*tensors, cu, **options), tensors)
    dq = DQ | ({"union_kernel", "selected_dq_kernel"} if tokens > 48 else set())
    dkv = DKV | ({"selected_dkv_kernel"} if tokens > 48 else set())
    for wanted, kernels in enumerate((dq, dkv, dkv, {"dots_kernel"})):
        for i, x in enumerate(tensors):
            x.requires_grad_(i == wanted)
        out = nsa_triton.nsa_attention(*tensors, cu, **options)
        launches.clear()
        out.backward(cotangent(out))
        assert {name for name, _ in launches} == kernels
        assert torch.equal(tensors[wanted].grad, expected[wanted])
        assert [x.grad is None for x in tensors] == [i != wanted for i in range(4)]
        tensors[wanted].grad = None
    assert not nsa_triton.nsa_attention(*(x.detach() for x in tensors), cu, **options).requires_grad


def test_checkpointing_changes_nothing():
    tensors, cu, _, options = inputs(*TINY)

    def attend(*tensors):
        return nsa_triton.nsa_attention(*tensors, cu, **options)

    expected = attend(*tensors)
    grads = gradients(expected, tensors)
    for use_reentrant in (False, True):
        out = checkpoint(attend, *tensors, use_reentrant=use_reentrant)
        assert torch.equal(out, expected)
        out.backward(cotangent(out))
        assert_all_equal([x.grad for x in tensors], grads)
        for x in tensors:
            x.grad = None


def test_compiled_training_steps_equal_eager_ones_at_any_length():
    def attend(q, k, v, gates, cu):
        return 2 * nsa_triton.nsa_attention(q * 1.5, k, v, gates, cu, block_size=16, block_count=3, window_size=9)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for lengths in ([40, 13], [40], [7, 0, 23], [31, 20], [11, 12, 13]):  # more than 48, and fewer
        tensors, cu, _, _ = inputs(lengths, *TINY[1:])
        out, expected = compiled(*tensors, cu), attend(*tensors, cu)
        assert torch.equal(out, expected)
        assert_all_equal(gradients(out, tensors), gradients(expected, tensors))
    assert counter.frame_count == 2  # for the first lengths, and for any


def test_asking_for_the_device_does_not_break_a_compiled_graph(monkeypatch):
    for capability, expected in (((9, 0), 1), ((7, 5), 0)):
        # What cannot be traced, as the real one cannot.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: (c, os.getppid())[0])
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: x + nsa_triton._has_kernels(torch.device("cuda")), fullgraph=True, backend="eager"
        )
        assert compiled(torch.zeros(2)).tolist() == [expected] * 2


def test_autocast_changes_nothing():
    tensors, cu, _, options = inputs(*TINY)
    expected = nsa_triton.nsa_attention(*tensors, cu, **options)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = nsa_triton.nsa_attention(*tensors, cu, **options)
        grads = gradients(out, tensors)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    assert_all_equal(grads, gradients(expected, tensors))


def test_training_can_follow_inference_mode():
    tensors, cu, _, options = inputs(*TINY)
    with torch.inference_mode():
        before = nsa_triton.nsa_attention(*tensors, cu, **options)
    out = nsa_triton.nsa_attention(*tensors, cu, **options)
    assert torch.equal(out, before)
    assert all(grad.isfinite().all() for grad in gradients(out, tensors))


# torch's own check reads it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("lengths", [[30, 5], [30, 25]])
def test_operators_are_what_torch_expects_of_them(lengths):
    """All blocks are chosen, or some."""
    tensors, cu, _, _ = inputs(lengths, *TINY[1:])
    q, k, v, gates = tensors
    of_some = ("test_schema", "test_faketensor")  # others are for operators with a gradient
    sizes = {"block_size": 16, "window_size": 9, "scale": None}
    torch.library.opcheck(nsa_triton._attend_gated, (*tensors, cu, cu), {**sizes, "block_count": 3, "save": True})
    branch = {**sizes, "branch": "pooled", "reverse": True}
    means = sum(n // 16 for n in lengths)
    torch.library.opcheck(nsa_triton._attend, (q, k[:means], v[:means], None, None, cu, cu), branch)

    out, outputs, lse, blocks = nsa_triton._attend_gated(*tensors, cu, cu, **sizes, block_count=3, save=True)
    assert bool((blocks == -1).all()) == (sum(lengths) <= 48)
    tensors = [x.detach() for x in (out, outputs, lse, q, k, v, gates, blocks)]
    settings = {**sizes, "branches": [*nsa_launches.BRANCHES], "reverse": False, "need_q": True, "need_kv": True}
    arguments = (tensors[0], None, *tensors[1:], None, cu, cu)
    torch.library.opcheck(nsa_triton._attend_backward, arguments, settings, test_utils=of_some)

    settings = {**sizes, "block_count": 3, "spread": True}
    arguments = (q.detach(), k.detach(), lse[0].detach(), None, cu, cu)
    torch.library.opcheck(nsa_triton._choose, arguments, settings, test_utils=of_some)


def test_the_file_can_be_imported_again_under_another_name_and_under_the_same():
    """As remote code is next to the installed package, and by two checkpoints."""
    tensors, cu, _, options = inputs([20], *TINY[1:])
    expected = nsa_triton.nsa_attention(*tensors, cu, **options)
    spec = importlib.machinery.ModuleSpec("other", None, is_package=True)
    spec.submodule_search_locations = [str(Path(nsa_triton.__file__).parent)]
    copies = []

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "other"]:
            del sys.modules[name]

    try:
        for _ in range(2):
            sys.modules["other"] = importlib.util.module_from_spec(spec)
            copies.append(importlib.import_module("other.nsa_triton"))
            forget()
        assert len({copy._namespace for copy in (*copies, nsa_triton)}) == 3
        for copy in copies:
            out = copy.nsa_attention(*tensors, cu, **options)
            assert relative_rms(out, expected.double()) < 1e-6  # tiles are larger here
            assert all(grad.isfinite().all() for grad in gradients(out, tensors))
    finally:
        forget()


def test_no_queries_give_no_output_and_no_gradient():
    for keys in (0, 20):
        tensors, cu, cu_k, options = inputs([0], 7, 1, 16, 16, 3, 9, torch.float32, [keys])
        out = nsa_triton.nsa_attention(*tensors, cu, cu_seqlens_k=cu_k, **options)
        assert out.shape == (0, 7, 16)
        for x, grad in zip(tensors, gradients(out, tensors), strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


def test_what_the_kernels_cannot_do_is_an_error():
    (q, k, v, gates), cu, _, options = inputs([20], 7, 1, 16, 16, 3, 9, torch.float32)
    with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
        nsa_triton.window_attention(q.double(), k.double(), v.double(), cu)
    with pytest.raises(ValueError, match="block_size"):
        nsa_triton.nsa_attention(q, k, v, gates, cu, block_size=24)
    with pytest.raises(ValueError, match="gates"):
        nsa_triton.nsa_attention(q, k, v, gates[:, :2], cu)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        nsa_triton.window_attention(q, k, v, cu, scale=0)
    with pytest.raises(ValueError, match="cu_seqlens must be on .* like q, got meta"):
        nsa_triton.window_attention(q, k, v, cu.to("meta"))
    lse = torch.zeros(20, 7, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="lse must be floating-point"):
        nsa_triton.select_blocks(q, k, lse, cu)
    assert nsa_triton.available(q) == (DEVICE == "cuda")
    assert not nsa_triton.available(q.double())


@needs_gpu
def test_offsets_beyond_two_to_the_31_are_right():
    n, heads = 700_000, 28  # 2.5e9 elements of q
    q = torch.randn(n, heads, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(n, 4, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    cu = torch.tensor([0, n], dtype=torch.int32, device=DEVICE)
    o, _ = nsa_triton.window_attention(q, k, v, cu)
    tail = torch.tensor([0, 100], dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([0, 400], dtype=torch.int32, device=DEVICE)
    few, _ = nsa_triton.window_attention(q[-100:], k[-400:], v[-400:], tail, cu_seqlens_k=keys)
    assert relative_rms(o[-100:], few.double()) < 1e-2
    for grad, expected in zip(
        torch.autograd.grad(o[-100:].float().square().sum(), (q, k, v)),
        torch.autograd.grad(few.float().square().sum(), (q, k, v)),
        strict=True,
    ):
        assert relative_rms(grad[-400:], expected[-400:].double()) < 2e-2


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
    assert torch.cuda.max_memory_allocated() - before - q.nbytes < 1e9  # beyond the output


@needs_gpu
def test_workspace_of_the_backward_pass_at_64k_stays_below_one_and_a_half_gigabytes():
    n = 65536
    q = torch.randn(n, 28, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(n, 4, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    gates = torch.rand(n, 28, 3, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    out = nsa_triton.nsa_attention(q, k, v, gates, torch.tensor([0, n], dtype=torch.int32, device=DEVICE))
    d_out = torch.ones_like(out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, (q, k, v, gates), d_out)
    assert torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads) < 1.5e9


def test_the_file_can_be_imported_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import conftest, torch; from videonsa import nsa_triton;"
        "x = torch.zeros(1, 1, 16); assert not nsa_triton.available(x);"
        "nsa_triton.window_attention(x, x, x, torch.tensor([0, 1], dtype=torch.int32))"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert "nsa_triton needs triton" in done.stderr
