"""nsa_torch.py by its costs: every way to compute a branch, and what each multiplies.

`tests/brute.py` has the brute force. Here the oracle is one masked softmax over all keys for each branch,
which is quick enough for streams of several pieces and many chunks.
"""

import pytest
import torch

from videonsa import nsa_softmax, nsa_torch

SIZES = {"block_size": 16, "block_count": 4}
WINDOW = 20
BRANCHES = ["compression", "selection", "window"]


def masked(q, k, v, visible, scale=None):
    """Softmax over the keys where visible [G or 1, C, n]: o [C, H, D], lse [C, H]."""
    groups = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("cgrd,mgd->gcrm", q.unflatten(1, (groups, -1)), k) * scale
    logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    o = torch.einsum("gcrm,mgd->cgrd", p, v)
    return o.flatten(1, 2), lse.transpose(0, 1).flatten(1)


def oracle(branch, q, k, v, queries, keys, blocks=None):
    """A branch of packed samples by masks."""
    outs = []
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        n = d - c
        own_k, own_v = k[c:d], v[c:d]
        i, j = torch.arange(n - (b - a), n)[:, None], torch.arange(n)
        if branch == "compression":
            whole = n // 16 * 16
            own_k, own_v = (x[:whole].unflatten(0, (-1, 16)).mean(1) for x in (own_k, own_v))
            visible = (torch.arange(whole // 16) < (i + 1) // 16)[None]
        elif branch == "window":
            visible = ((j <= i) & (j > i - WINDOW))[None]
        else:
            visible = (blocks[:, a:b, :, None] == j // 16).any(2) & (j <= i)
        outs.append(masked(q[a:b], own_k, own_v, visible))
    return tuple(torch.cat(x) for x in zip(*outs, strict=True))


def compute(branch, q, k, v, lengths, blocks=None):
    if branch == "compression":
        return nsa_torch.compressed_attention(q, k, v, **lengths, block_size=16)
    if branch == "window":
        return nsa_torch.window_attention(q, k, v, **lengths, window_size=WINDOW)
    return nsa_torch.selected_attention(q, k, v, blocks, **lengths, block_size=16)


def make(keys, queries, heads, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), heads, 16), (sum(keys), groups, 16), (sum(keys), groups, 16), (sum(queries), heads, 3)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors[3] = tensors[3].sigmoid()
    ends = [[0, *torch.tensor(x).cumsum(0).tolist()] for x in (queries, keys)]
    names = ("cu_seqlens", "cu_seqlens_k")
    lengths = {name: torch.tensor(x, dtype=torch.int32) for name, x in zip(names, ends, strict=True)}
    return [x.requires_grad_() for x in tensors], lengths, ends


def assert_same(actual, expected, needed):
    """Values and gradients to 1e-12."""
    (o, lse), (expected_o, expected_lse) = actual, expected
    torch.testing.assert_close(o, expected_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    for x, y in zip(*(torch.autograd.grad(out, needed, cotangent) for out in (o, expected_o)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("branch", BRANCHES)
def test_any_number_of_heads_may_share_a_kv_head(branch, group):
    tensors, lengths, ends = make((1, 63, 64, 65, 200), (1, 63, 10, 65, 150), 2 * group, 2)
    q, k, v, _ = tensors
    blocks = random_blocks(lengths)
    assert_same(compute(branch, q, k, v, lengths, blocks), oracle(branch, q, k, v, *ends, blocks), [q, k, v])


@pytest.mark.parametrize("piece, scores", [(2048, 2**22), (64, 2**22), (50, 3000), (64, 1)])
@pytest.mark.parametrize("branch", BRANCHES)
def test_pieces_and_chunks_are_invisible(branch, piece, scores, monkeypatch):
    monkeypatch.setattr(nsa_softmax, "PIECE", piece)
    monkeypatch.setattr(nsa_softmax, "MAX_SCORES_CPU", scores)
    tensors, lengths, ends = make((230, 0, 65), (200, 0, 33), 4, 2)
    q, k, v, _ = tensors
    blocks = random_blocks(lengths)
    assert_same(compute(branch, q, k, v, lengths, blocks), oracle(branch, q, k, v, *ends, blocks), [q, k, v])


def random_blocks(lengths):
    """Blocks up to beyond the stream, ascending, -1 for none, and none at all for some queries: [2, N, 5]"""
    n = int(lengths["cu_seqlens"][-1])
    generator = torch.Generator().manual_seed(2)
    blocks = torch.rand(2, n, 18, generator=generator).argsort(-1)[..., :5].sort(-1).values.int() - 2
    blocks[:, ::7] = -1
    return blocks.clamp(min=-1)


def whole(tensors, lengths):
    return nsa_torch.nsa_attention(*tensors, **lengths, **SIZES, window_size=WINDOW)


@pytest.mark.parametrize(
    "below, faster, module, used",
    [
        (0.0, False, nsa_torch, "mixture"),
        (2.0, False, nsa_softmax, "block_parts"),
        (0.0, True, nsa_torch, "masked"),
        (2.0, True, nsa_torch, "block_parts"),
    ],
)
def test_each_way_gives_the_sum_of_the_branches(below, faster, module, used, monkeypatch):
    monkeypatch.setattr(nsa_softmax, "GATHER_BELOW", below)
    monkeypatch.setattr(nsa_softmax, "GATHER_BELOW_AMX", below)
    monkeypatch.setattr(nsa_softmax, "has_amx", lambda dtype: faster)
    monkeypatch.setattr(nsa_softmax, "PIECE", 64)
    monkeypatch.setattr(nsa_softmax, "NEAR", 50)
    monkeypatch.setattr(nsa_softmax, "FAR", 32)
    calls = count_calls(monkeypatch, used, module)
    tensors, lengths, ends = make((300, 65), (280, 20), 4, 2)
    q, k, v, gates = tensors
    _, lse = nsa_torch.compressed_attention(q, k, v, **lengths, block_size=16)
    blocks = nsa_torch.select_blocks(q, k, lse, **lengths, **SIZES)
    before = len(calls)
    out = whole(tensors, lengths)
    assert len(calls) > before
    branches = [oracle(branch, q, k, v, *ends, blocks)[0] for branch in BRANCHES]
    expected = sum(gate.unsqueeze(-1) * o for gate, o in zip(gates.unbind(-1), branches, strict=True))
    lse = torch.zeros(())
    assert_same((out, lse), (expected, lse), tensors)


def test_a_window_far_below_the_largest_logit_keeps_its_weights(monkeypatch):
    monkeypatch.setattr(nsa_softmax, "GATHER_BELOW", 0.0)
    tensors, lengths, _ = make((200,), (200,), 4, 2, torch.float32)
    q, k, v, gates = (x.detach() for x in tensors)
    q, k = q.abs(), k.clone()
    k[3] = 100
    expected = whole([x.double() for x in (q, k, v, gates)], lengths)
    torch.testing.assert_close(whole((q, k, v, gates), lengths).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("below", [0.0, 2.0])
def test_logits_far_above_those_before_do_not_overflow(below, monkeypatch):
    """With 300 at key 100 alone, and 1,000 at key 150, for all queries."""
    monkeypatch.setattr(nsa_softmax, "GATHER_BELOW", below)
    monkeypatch.setattr(nsa_softmax, "FAR", 32)
    tensors, lengths, _ = make((300,), (300,), 4, 2, torch.float32)
    q, k, v, gates = (x.detach() for x in tensors)
    q[..., 0], k[..., 0] = 4, 0
    k[100, :, 0], k[150, :, 0] = 300, 1000
    inputs = [x.requires_grad_() for x in (q, k, v, gates)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = whole(inputs, lengths), whole(exact, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    grads = (torch.autograd.grad(x.sum(), y) for x, y in ((out, inputs), (expected, exact)))
    for grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-3)


def test_gradients_bear_a_constant_in_all_keys():
    """It cancels, unless weights are rounded as much as logits of hundreds are."""
    tensors, lengths, _ = make((300,), (300,), 4, 2, torch.float32)
    q, k, v, gates = (x.detach() for x in tensors)
    inputs = [x.requires_grad_() for x in (30 * q, k + 30, v, gates)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grads = (torch.autograd.grad(whole(x, lengths).square().sum(), x) for x in (inputs, exact))
    for grad, expected in zip(*grads, strict=True):
        assert (grad - expected).norm() < 3e-4 * expected.norm()


def test_inputs_on_a_cpu_stay_there_whatever_the_default_device():
    tensors, lengths, _ = make((200,), (200,), 4, 2)
    expected = whole(tensors, lengths)
    with torch.device("meta"):
        out = whole(tensors, lengths)
    assert torch.equal(out, expected)


def test_nothing_is_chosen_where_there_is_no_choice(monkeypatch):
    calls = count_calls(monkeypatch, "choose")
    tensors, lengths, _ = make((64, 30), (64, 30), 4, 2)
    whole(tensors, lengths)
    assert not calls
    tensors, lengths, _ = make((65,), (65,), 4, 2)
    whole(tensors, lengths)
    assert len(calls) == 1


def test_compression_that_needs_no_lse_takes_one_fused_attention(monkeypatch):
    monkeypatch.setattr(nsa_softmax, "has_amx", lambda dtype: True)
    calls = count_calls(monkeypatch, "see_means")
    tensors, lengths, _ = make((300, 30), (300, 10), 4, 2)
    whole(tensors, lengths)
    assert not calls


def test_only_chosen_blocks_are_multiplied(monkeypatch):
    """Logits of the selection of 1,024 queries: 4 blocks of 16 keys for each, not all before it."""
    made = []
    original = nsa_softmax._logits
    monkeypatch.setattr(nsa_softmax, "_logits", lambda *x: made.append(original(*x)) or made[-1])
    tensors, lengths, _ = make((1024,), (1024,), 2, 1)
    q, k, v, _ = (x.detach() for x in tensors)
    blocks = nsa_torch.select_blocks(q, k, torch.zeros(1024, 2), **lengths, **SIZES)
    nsa_torch.selected_attention(q, k, v, blocks, **lengths, block_size=16)
    assert sum(x.numel() for x in made) <= 1024 * 2 * 4 * 16 * 1.1  # tiles are not all full


def test_a_large_window_is_multiplied_with_fewer_queries_at_a_time(monkeypatch):
    made = []
    original = nsa_softmax._near_logits
    monkeypatch.setattr(nsa_softmax, "_near_logits", lambda *x: made.append(original(*x)) or made[-1])
    monkeypatch.setattr(nsa_softmax, "MAX_SCORES", 2**13)
    tensors, lengths, _ = make((500,), (500,), 4, 2)
    nsa_torch.nsa_attention(*(x.detach() for x in tensors), **lengths, **SIZES, window_size=200)
    assert max(x.numel() for logits in made for x in logits) <= 2**13


def test_a_gpu_without_kernels_gets_no_loop_over_blocks():
    chosen = torch.zeros(1, 4, 2, dtype=torch.bool, device="meta")
    assert not nsa_softmax.is_cheaper_by_parts(chosen, torch.arange(4), 16, torch.float32)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("below", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_close_whichever_way_is_taken(dtype, below, faster, monkeypatch):
    tensors, lengths, _ = make((300,), (300,), 4, 2, dtype)
    expected = whole([x.double() for x in tensors], lengths)
    monkeypatch.setattr(nsa_softmax, "has_amx", lambda dtype: faster)
    for name in ("GATHER_BELOW", "GATHER_BELOW_AMX"):
        monkeypatch.setattr(nsa_softmax, name, below)
    error = (whole(tensors, lengths).double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 5e-3


def count_calls(monkeypatch, name, module=nsa_torch):
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *x, **y: calls.append(name) or original(*x, **y))
    return calls


@pytest.mark.parametrize("factor", [-2, 200])  # 200: logits of later queries exceed `MAX_SUM`
@pytest.mark.parametrize("below", [0.0, 0.7])
def test_however_many_later_queries_choose_a_block_earlier_results_keep_their_bits(below, factor, monkeypatch):
    monkeypatch.setattr(nsa_softmax, "GATHER_BELOW", below)
    monkeypatch.setattr(nsa_softmax, "FAR", 64)
    tensors, lengths, _ = make((500,), (500,), 14, 2, torch.float32)
    q, k, v, gates = (x.detach() for x in tensors)
    before = whole((q, k, v, gates), lengths)
    for j in (100, 255, 303, 499):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[j:] = factor * x[j:]
        assert torch.equal(whole((*changed, gates), lengths)[:j], before[:j])


def test_sums_that_are_scaled_again_keep_their_bits_beside_other_rows(monkeypatch):
    """8 rows stand for the 16 of a tile, which AVX-512 rounds as a rest: exp2 takes 32 floats there, 16 with AVX2."""
    monkeypatch.setattr(nsa_softmax, "TILE", 8)
    generator = torch.Generator().manual_seed(0)

    def sums(n, x, k, v):
        others = [nsa_softmax.Part(torch.arange(n), slice(start, start + 16)) for start in (16, 32)]
        return nsa_softmax._sums(x, k, v, [nsa_softmax.Part(None, slice(0, 16)), *others])

    for _ in range(100):
        x, k, v = (0.2 * torch.randn(n, *shape, generator=generator) for n, *shape in ((16, 1, 16), (48, 16), (48, 16)))
        x[..., 0] = 1
        # The second 16 keys leave the shift where it is, the last raise it to little more than the log of the sum.
        k[:, 0] = torch.tensor([0.0, 59.0, 64.0]).repeat_interleave(16)
        for few, all_ in zip(sums(8, x, k, v), sums(16, x, k, v), strict=True):
            assert torch.equal(few[:8], all_[:8])
