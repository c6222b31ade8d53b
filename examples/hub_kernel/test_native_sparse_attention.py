"""Outputs and gradients against masked softmaxes in fp64: `python -m pytest tests`, with `kernels` and pytest.

The Triton kernels run on a GPU, plain PyTorch on a CPU.
"""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from kernels import get_local_kernel

nsa = get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"block_size": 16, "block_count": 4, "window_size": 20}
CASES = {  # query heads, KV heads, and each sequence's queries and keys
    "group 1": (2, 2, [130], [130]),
    "group 7, packed sequences": (7, 1, [1, 63, 0, 145], [1, 63, 0, 145]),
    "group 16, fewer queries than keys": (32, 2, [5, 16], [150, 16]),
}


def attend(q, k, v, seen):
    """o [m, H, D] of queries over the keys that `seen` [G or 1, m, n] says, and probabilities [G, m, H / G, n]."""
    logits = torch.einsum("mgrd,ngd->gmrn", q.unflatten(1, (k.shape[1], -1)), k) * q.shape[2] ** -0.5
    p = logits.masked_fill(~seen[:, :, None], -1e30).softmax(-1) * seen[:, :, None]
    return torch.einsum("gmrn,ngd->mgrd", p, v).flatten(1, 2), p


def reference(q, k, v, gates, block_size, block_count, window_size):
    """Of one sequence, whose last tokens are the queries."""
    i, j = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    complete, count = len(k) // block_size, (len(k) - 1) // block_size + 1
    means = [x[: complete * block_size].unflatten(0, (complete, block_size)).mean(1) for x in (k, v)]
    block, own = torch.arange(count), i // block_size
    compressed, p = attend(q, *means, ((block[:complete] + 1) * block_size <= i + 1)[None])

    importance = torch.nn.functional.pad(p.sum(2), (0, count - complete))  # [G, m, blocks]
    importance = importance.masked_fill((block == 0) | (block >= own - 1), torch.inf).masked_fill(block > own, -1)
    best = importance.topk(min(block_count, count), -1).indices
    chosen = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, best, True)
    selected, _ = attend(q, k, v, chosen.repeat_interleave(block_size, -1)[..., : len(k)] & (j <= i))

    window, _ = attend(q, k, v, ((j <= i) & (j > i - window_size))[None])
    return (torch.stack([compressed, selected, window], -1) * gates.unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_masked_softmaxes(case):
    heads, groups, queries, keys = case
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), heads, 32), (sum(keys), groups, 32), (sum(keys), groups, 32), (sum(queries), heads, 3)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    parts = zip(*(x.split(n) for x, n in zip(tensors, (queries, keys, keys, queries), strict=True)), strict=True)
    expected = torch.cat([reference(*part, **SIZES) for part in parts if len(part[0])])

    floats = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in tensors]
    starts = [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=DEVICE) for n in (queries, keys)]
    out = nsa.nsa_attention(*floats, starts[0], cu_seqlens_k=starts[1], **SIZES)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4)

    d_out = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(out, floats, d_out.to(DEVICE, torch.float32))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors, d_out), strict=True):
        torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_wrong_shape_is_named():
    q, cu_seqlens = torch.zeros(8, 4, 32, device=DEVICE), torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="gates must be"):
        nsa.nsa_attention(q, q, q, q, cu_seqlens)
