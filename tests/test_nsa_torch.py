"""nsa_torch.py against the brute force of `brute.py`: values, gradients, chosen blocks, and what may not leak."""

import pytest
import torch
import torch.nn.functional as F
from brute import (
    WHOLE_CASE,
    Brute,
    Case,
    assert_close,
    choose,
    each_branch,
    each_case,
    gradients,
    make_inputs,
    offsets,
    reference,
    run_branch,
    run_lse,
)

from videonsa import nsa_torch
from videonsa.nsa_torch import compressed_attention, nsa_attention, select_blocks, selected_attention, window_attention

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


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_how_many_later_queries_choose_a_block_changes_no_bit_whatever_the_threads(threads):
    case = Case((1100,), heads=7, kv_heads=1, dim=16, block_size=64, block_count=8, window_size=64)
    (q, k, v, gates), lengths = make_inputs(case, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        queries = q, perturbed(q, slice(900, None))
        whole, other = (run_branch("whole", [x, k, v, gates], lengths, case) for x in queries)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[:900], other[:900]) and not torch.equal(whole[900:], other[900:])


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
