"""Each branch of the kernels and its gradients against nsa_torch in fp64: on a GPU natively, elsewhere in triton's
interpreter with bounds checked and programs kept apart. The interpreter takes seconds per case, so cases do much at
once. test_compiled_kernels.py tests what ptxas makes of the kernels.
"""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    assert_lse_close,
    attend_where,
    backend,
    inputs,
    needs_gpu,
)

from videonsa import nsa_released, nsa_torch, nsa_triton

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("larger_tiles", "poison")

# lengths of the samples, query heads, KV heads, head dim, block size, block count, window, dtype, and, if they
# differ, lengths of the keys
SMALL = {
    "group 7, lengths 1, 63, 0, 65, packed": ([1, 63, 0, 65], 7, 1, 16, 16, 3, 20, torch.float32),
    "group 7, bf16, dim 128, as the 7B": ([66], 7, 1, 128, 64, 32, 256, torch.bfloat16),
    "group 7, bf16, blocks chosen": ([130], 7, 1, 32, 16, 4, 50, torch.bfloat16),
    "group 1, dim 80, window 1, blocks of 32": ([64, 130], 2, 2, 80, 32, 3, 1, torch.float32),
    "group 16, dim 96, fewer queries than keys": ([5, 16], 16, 1, 96, 16, 4, 30, torch.float32, [150, 16]),
    "group 2, fp16, dim 64, one query of a long stream": ([1], 4, 2, 64, 16, 3, 7, torch.float16, [333]),
    "group 4, blocks of 128, window beyond the sample": ([400], 4, 1, 32, 128, 3, 500, torch.bfloat16),
    "group 7, all blocks chosen, chunks": ([1, 30, 0, 33], 7, 1, 16, 16, 6, 20, torch.float32, [20, 43, 0, 33]),
    "group 2 of 3 KV heads": ([20, 36], 6, 3, 16, 16, 3, 9, torch.float32),
}
LARGE = {
    "7B, bf16": ([4096, 1, 63, 64, 65, 5000], 28, 4, 128, 64, 32, 256, torch.bfloat16),
    "7B, bf16, all blocks chosen": ([900, 1, 64, 65, 1018], 28, 4, 128, 64, 32, 256, torch.bfloat16),
    "7B, fp16": ([3000], 28, 4, 128, 64, 8, 256, torch.float16),
    "7B, fp32": ([2500, 700], 28, 4, 128, 64, 8, 256, torch.float32),
    "group 1": ([2000], 4, 4, 64, 32, 16, 100, torch.bfloat16),
    "group 2": ([2000], 8, 4, 80, 16, 40, 100, torch.bfloat16),
    "group 4": ([2000], 16, 4, 96, 128, 5, 100, torch.bfloat16),
    "group 16": ([2000], 32, 2, 128, 64, 16, 100, torch.bfloat16),
    "dim 16, chunks": ([77, 10], 7, 1, 16, 16, 7, 33, torch.bfloat16, [5000, 10]),
    "thousands of blocks": ([3], 2, 1, 16, 16, 5, 9, torch.float32, [16 * 4100]),
    "released": ([1500, 700], 64, 4, 128, 64, 8, 256, torch.bfloat16),
}
CASES = [pytest.param(case, id=name) for name, case in SMALL.items()]
CASES += [pytest.param(case, id=f"large: {name}", marks=needs_gpu) for name, case in LARGE.items()]


@pytest.mark.backend
@pytest.mark.parametrize("case", CASES)
def test_every_branch_and_its_gradients_equal_the_torch_path_in_fp64(case):
    (q, k, v, gates), cu, cu_k, options = inputs(*case)
    qkv, doubles = (q, k, v), [x.detach().double().requires_grad_() for x in (q, k, v, gates)]
    lengths = {"cu_seqlens_k": cu_k}
    size, window = {"block_size": options["block_size"]}, {"window_size": options["window_size"]}
    tolerance, exact = TOLERANCE[q.dtype], q.dtype == torch.float32

    compressed = backend.compressed_attention(*qkv, cu, **lengths, **size)
    reference = nsa_torch.compressed_attention(*doubles[:3], cu, **lengths, **size)
    count = {"block_count": options["block_count"]}
    blocks = backend.select_blocks(q, k, compressed[1], cu, **lengths, **size, **count)
    best = nsa_torch.select_blocks(*doubles[:2], reference[1], cu, **lengths, **size, **count)
    assert blocks.dtype == torch.int32
    different = (blocks != best).any(-1).float().mean()
    assert different == 0 if exact else different < 0.05  # means are rounded to the dtype of k

    # With the kernels' own choice of blocks, since one near tie decided otherwise is no error.
    selected = backend.selected_attention(*qkv, blocks, cu, **lengths, **size)
    windowed = backend.window_attention(*qkv, cu, **lengths, **window)
    references = [
        reference,
        nsa_torch.selected_attention(*doubles[:3], blocks, cu, **lengths, **size),
        nsa_torch.window_attention(*doubles[:3], cu, **lengths, **window),
    ]
    for branch, lse_tolerance in ((0, 1e-2), (1, 1e-4), (2, 1e-4)):
        o, lse = (compressed, selected, windowed)[branch]
        reference, reference_lse = references[branch]
        assert_close(o, reference, tolerance)
        assert_lse_close(lse, reference_lse, 1e-5 if exact else lse_tolerance)
        assert_gradients_close(o, qkv, reference, doubles[:3])

    out = backend.nsa_attention(*qkv, gates, cu, cu_seqlens_k=cu_k, **options)
    reference = sum(doubles[3][..., b, None] * o for b, (o, _) in enumerate(references))
    assert_close(out, reference, tolerance)
    assert_gradients_close(out, (*qkv, gates), reference, doubles)


POOLED = {
    "group 7, bf16": (7, 1, 32, 16, torch.bfloat16, 70, 5),
    "group 2": (4, 2, 16, 32, torch.float32, 100, 63),
    "first at a later block": (2, 2, 80, 16, torch.float16, 21, 100),
}
LARGE_POOLED = {"released, bf16": (64, 4, 128, 64, torch.bfloat16, 5000, 100)}
POOLED_CASES = [pytest.param(case, id=name) for name, case in POOLED.items()]
POOLED_CASES += [pytest.param(case, id=f"large: {name}", marks=needs_gpu) for name, case in LARGE_POOLED.items()]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", POOLED_CASES)
def test_attention_over_given_means_and_its_gradients_equal_the_torch_path_in_fp64(case, reverse):
    heads, groups, dim, block_size, dtype, length, first = case
    (q, *_), *_ = inputs([length], heads, groups, dim, block_size, 3, 1, dtype)
    (_, k, v, _), *_ = inputs([(first + length) // block_size], heads, groups, dim, block_size, 3, 1, dtype)
    options = {"first": first, "block_size": block_size, "reverse": reverse}
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    o, lse = nsa_triton.pooled_attention(q, k, v, **options)
    expected, expected_lse = nsa_released.pooled_attention(*doubles, **options)
    assert_close(o, expected, TOLERANCE[dtype])
    assert_lse_close(lse, expected_lse, TOLERANCE[dtype])
    assert_gradients_close(o, (q, k, v), expected, doubles)


@pytest.mark.parametrize("branch", ["compressed", "selected", "remainder", "prefix"])
def test_softmaxes_that_are_to_be_joined_have_gradients_of_their_lse(branch):
    """Against one masked softmax over all keys in fp64. Samples of 40 and 70 tokens, 5 and 20 text tokens."""
    (q, k, v, _), cu, _, _ = inputs([40, 70], 4, 2, 16, 16, 3, 9, torch.float32)
    cu_text = torch.tensor([0, 5, 25], dtype=torch.int32, device=DEVICE)
    sample = torch.tensor([0] * 40 + [1] * 70, device=DEVICE)
    i = torch.tensor([*range(40), *range(70)], device=DEVICE)
    blocks = torch.rand(2, 110, 5, generator=torch.Generator().manual_seed(2)).argsort(-1)[..., :2].int().to(DEVICE)
    blocks[:, ::7, 1] = -1
    is_chosen = (blocks[..., None] == torch.arange(5, device=DEVICE)).any(2)  # [G, N, blocks]
    options = {"block_size": 16, "with_lse_gradient": True}
    if branch == "prefix":
        k, v = (x[:25].detach().requires_grad_() for x in (k, v))
    doubles = keys = [x.detach().double().requires_grad_() for x in (q, k, v)]

    if branch == "selected":
        o, lse = nsa_triton.selected_attention(q, k, v, blocks, cu, **options)
        visible = (sample == sample[:, None]) & (i <= i[:, None]) & is_chosen[:, :, i // 16]
    elif branch == "prefix":
        seen = (i // 3).clamp_max(torch.tensor([5, 20], device=DEVICE)[sample]).int()
        o, lse = nsa_triton.prefix_attention(q, k, v, seen, cu, cu_text, with_lse_gradient=True)
        key = torch.arange(25, device=DEVICE) - cu_text[sample][:, None]  # [N, T]
        visible = ((key >= 0) & (key < seen[:, None])).expand(2, -1, -1)
    else:
        means = [torch.cat([x[:32], x[40:104]]).unflatten(0, (6, 16)).mean(1) for x in doubles[1:]]
        keys = [doubles[0], *means]
        block, of_sample = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]], device=DEVICE)
        visible = ((of_sample == sample[:, None]) & ((block + 1) * 16 <= i[:, None] + 1)).expand(2, -1, -1)
        if branch == "compressed":
            o, lse = nsa_triton.compressed_attention(q, k, v, cu, **options)
        else:
            o, lse = nsa_triton.remainder_attention(q, k, v, blocks, cu, **options)
            visible = visible & ~is_chosen[:, :, block]

    expected, expected_lse = attend_where(*keys, visible)
    some = visible.any(-1).repeat_interleave(2, 0).T  # [N, H]: rows with a key
    assert some.any() and not some.all()
    assert (lse[~some] == -torch.inf).all()
    assert_close(o, expected, 1e-5)
    assert_close(lse[some], expected_lse[some], 1e-5)
    both, expected_both = (torch.cat([x.flatten(), y[some]]) for x, y in ((o, lse), (expected, expected_lse)))
    assert_gradients_close(both, (q, k, v), expected_both, doubles)
