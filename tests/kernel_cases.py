"""Inputs and comparisons of the tests of the kernels."""

import importlib
import os
from itertools import accumulate

import pytest
import torch

# What the tests marked `backend` test: any module with the functions of nsa_torch. docs/add_a_kernel.md says more.
backend = importlib.import_module(os.environ.get("VIDEONSA_BACKEND", "videonsa.nsa_triton"))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-3}  # relative RMS
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter, or about devices")


def inputs(lengths, heads, groups, dim, block_size, block_count, window_size, dtype, lengths_k=None, size=1.0):
    """q, k, v, gates, leaves that want a gradient; where samples start in q and, if elsewhere, in k; and the options of
    nsa_attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(n), h, dim, generator=generator)
        for n, h in ((lengths, heads), (lengths_k or lengths, groups), (lengths_k or lengths, groups))
    )
    gates = torch.rand(sum(lengths), heads, 3, generator=generator)
    cu_seqlens, cu_seqlens_k = (
        torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=DEVICE) for n in (lengths, lengths_k or lengths)
    )
    tensors = [x.to(DEVICE, dtype).requires_grad_() for x in (q * size, k * size, v, gates)]
    options = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    return tensors, cu_seqlens, cu_seqlens_k if lengths_k else None, options


def relative_rms(x, reference):
    x, reference = x.detach().double(), reference.detach()
    return float((x - reference).norm() / reference.norm().clamp_min(1e-30))


def assert_close(x, reference, tolerance):
    assert x.isfinite().all()
    assert relative_rms(x, reference) <= tolerance


def assert_lse_close(lse, reference, tolerance):
    assert lse.dtype == torch.float32 and not lse.requires_grad
    seen = reference.isfinite()
    assert torch.equal(lse == -torch.inf, ~seen)
    assert seen.sum() == 0 or (lse[seen].double() - reference[seen]).abs().max() <= tolerance


def cotangent(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)


def gradients(out, tensors, **options):
    return torch.autograd.grad(out, tensors, cotangent(out), **options)


def assert_gradients_close(out, tensors, reference, doubles, tolerance=None):
    """Gradients of `out` against those of `reference` in fp64. One that is (almost) 0, as that of the only logit of a
    softmax, is compared on the scale of the largest."""
    grads = gradients(out, tensors)
    expected = torch.autograd.grad(reference, doubles, cotangent(out).double(), retain_graph=True)
    largest = max(x.norm() for x in expected)
    for x, grad, wanted in zip(tensors, grads, expected, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape and grad.isfinite().all()
        error = (grad.double() - wanted).norm() / wanted.norm().clamp_min(largest / 20).clamp_min(1e-30)
        assert error <= (tolerance or GRADIENT_TOLERANCE[x.dtype])


def assert_all_equal(tensors, others):
    for x, other in zip(tensors, others, strict=True):
        assert torch.equal(x, other)


def attend_where(q, k, v, visible):
    """o and lse of attention over the keys that `visible` [G, N, M] says."""
    visible = visible[:, :, None]
    x = torch.einsum("ngrd,mgd->gnrm", q.unflatten(1, (k.shape[1], -1)), k) * q.shape[2] ** -0.5
    x = x.masked_fill(~visible, -1e30)
    lse = x.logsumexp(-1)
    p = (x - lse[..., None]).exp().where(visible, 0)
    return torch.einsum("gnrm,mgd->ngrd", p, v).flatten(1, 2), lse.transpose(0, 1).flatten(1)
