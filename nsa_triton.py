"""Native Sparse Attention as Triton kernels: the functions of `nsa_torch.py`, with the same arguments and results.

This file has the functions and their gradients. `nsa_launches.py` says which kernels compute them, and with what tiles;
`nsa_kernels.py` and `nsa_kernels_backward.py` are the kernels.

Nothing waits for the device and there are no atomics: results repeat exactly. Dots accumulate in fp32; those of fp32
inputs are IEEE. Gradients cannot be differentiated again; those of `nsa_torch.py` can.
"""

import os
import re

import torch

from .nsa_checks import check_arguments, check_block_count, check_prefix
from .nsa_launches import BRANCHES, Gradients, Launches, capability, chooses_all, triton


def available(q: torch.Tensor) -> bool:
    """Whether the kernels can serve such queries: on an NVIDIA GPU from sm_80 on; fp16, bf16 or fp32; head dim 16 to
    128."""
    return triton is not None and q.device.type == "cuda" and _has_kernels(q.device) and _is_supported(q)


def nsa_attention(
    q, k, v, gates, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, block_count=32, window_size=256, scale=None,
):  # fmt: skip
    """See `nsa_torch.nsa_attention`."""
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, gates=gates, **sizes)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates))
    return _attend_gated(q, k, v, gates, cu_seqlens, cu_seqlens_k, **sizes, save=save)[0]


# lse has no gradient, unless a caller that joins softmaxes asks for it.


def compressed_attention(
    q, k, v, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, scale=None, with_lse_gradient=False,
):  # fmt: skip
    """See `nsa_torch.compressed_attention`. Block means are rounded to the dtype of k."""
    _check(q, k, v, cu_seqlens, cu_seqlens_k, block_size=block_size, scale=scale)
    sizes = {"block_size": block_size, "scale": scale}
    return _branch("compressed", q, k, v, cu_seqlens, cu_seqlens_k, with_lse_gradient, **sizes)


@torch.no_grad()
def select_blocks(
    q, k, lse, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, block_count=32, window_size=None, spread=False, own_importance=None, scale=None,
):  # fmt: skip
    """See `nsa_torch.select_blocks`."""
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size, "scale": scale}
    _check(q, k, None, cu_seqlens, cu_seqlens_k, lse=lse, own_importance=own_importance, **sizes)
    if window_size is None:
        sizes["window_size"] = block_size + 1
    check_block_count(block_count, block_size, sizes["window_size"])
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return _choose(q, k, lse, own_importance, cu_seqlens, cu_seqlens_k, **sizes, spread=spread)


def selected_attention(
    q, k, v, blocks, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, scale=None, with_lse_gradient=False,
):  # fmt: skip
    """See `nsa_torch.selected_attention`."""
    sizes = {"blocks": blocks, "block_size": block_size, "scale": scale}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, **sizes)
    return _branch("selected", q, k, v, cu_seqlens, cu_seqlens_k, with_lse_gradient, **sizes)


def window_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, window_size=256, scale=None):
    """See `nsa_torch.window_attention`."""
    sizes = {"window_size": window_size, "scale": scale}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, **sizes)
    return _branch("window", q, k, v, cu_seqlens, cu_seqlens_k, **sizes)


def pooled_attention(q, k, v, *, first, block_size=64, reverse=False, scale=None):
    """See `nsa_released.pooled_attention`."""
    _check(q, k, v, None, None, first=first, block_size=block_size, scale=scale)
    ends = torch.arange(2, dtype=torch.int32, device=q.device)
    sizes = {"block_size": block_size, "scale": scale, "reverse": reverse}
    return _branch("pooled", q, k, v, ends * len(q), ends * (first + len(q)), **sizes)


def prefix_attention(q, k, v, seen, cu_seqlens, cu_seqlens_k, *, scale=None, with_lse_gradient=False):
    """Attention over the first keys of a query's sample.

    Args:
        k, v: [T, G, D] keys of all samples, such as text; they need not be those of the queries.
        seen: int32 [N], how many of its sample's keys a query sees; rises within a sample.
        cu_seqlens_k: int32 [B + 1], where each sample's keys start and end in T.
        with_lse_gradient: let lse have a gradient.

    Others, and what is returned, as in `nsa_torch.compressed_attention`.
    """
    _check_launchable(q)
    check_prefix(q, k, v, seen, cu_seqlens, cu_seqlens_k, scale=scale, read_lengths=reads_lengths(q))
    _check_supported(q)
    return _branch("prefix", q, k, v, cu_seqlens, cu_seqlens_k, with_lse_gradient, seen=seen, scale=scale)


def remainder_attention(
    q, k, v, blocks, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, scale=None, with_lse_gradient=False,
):  # fmt: skip
    """`compressed_attention` without the blocks [G, N, count] given, none of them twice for a query."""
    sizes = {"blocks": blocks, "block_size": block_size, "scale": scale}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, **sizes)
    return _branch("remainder", q, k, v, cu_seqlens, cu_seqlens_k, with_lse_gradient, **sizes)


def _branch(
    name, q, k, v, cu_seqlens, cu_seqlens_k, with_lse_gradient=False, *,
    blocks=None, seen=None, block_size=64, window_size=0, reverse=False, scale=None,
):  # fmt: skip
    """o and lse of one branch; see `_attend`."""
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    sizes = {"block_size": block_size, "window_size": window_size, "scale": scale}
    o, lse = _attend(q, k, v, blocks, seen, cu_seqlens, cu_seqlens_k, branch=name, reverse=reverse, **sizes)
    return o, lse if with_lse_gradient else lse.detach()


def _check(q, k, v, cu_seqlens, cu_seqlens_k, **arguments):
    _check_launchable(q)
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, read_lengths=reads_lengths(q), **arguments)
    _check_supported(q)


def _check_launchable(q):
    if triton is None:
        raise ImportError("nsa_triton needs triton (pip install triton); nsa_torch computes the same without it")
    if not _can_launch(q.device):
        raise ValueError(f"q must be on a CUDA device for the Triton kernels, got {q.device}; nsa_torch runs anywhere")


def _check_supported(q):
    if not _is_supported(q):
        raise ValueError(
            "q must be fp16, bf16 or fp32 with a head dim of 16 to 128 for the Triton kernels, "
            f"got {q.dtype} {list(q.shape)}; nsa_torch takes others"
        )


def reads_lengths(q: torch.Tensor) -> bool:
    """Not on a GPU, which that would wait for."""
    return q.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_supported(q: torch.Tensor) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and 16 <= q.shape[-1] <= 128


@torch.compiler.assume_constant_result  # a compiler cannot look into what asks the device
def _has_kernels(device: torch.device) -> bool:
    return torch.version.hip is None and capability(device) >= (8, 0)


def _can_launch(device: torch.device) -> bool:
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


# Operators, so that torch.compile sees one node. Settings are keywords, so that a backward pass returns no gradients
# for them. They bear the name of the package, as those of Hub kernels must. Remote code may be imported next to an
# installed package, and again: each import registers under a name of its own.
_namespace = re.sub(r"\W", "_", __name__.rpartition(".")[0], flags=re.ASCII)
while hasattr(getattr(torch.ops, _namespace), "attend"):
    _namespace += "_"


def _operator(name: str, schema: str):
    return torch.library.custom_op(f"{_namespace}::{name}", mutates_args=(), schema=schema)


@_operator(
    "choose",
    "(Tensor q, Tensor k, Tensor lse, Tensor? own_importance, Tensor cu_seqlens, Tensor cu_seqlens_k, *, "
    "int block_size, int block_count, int window_size, float? scale, bool spread) -> Tensor",
)
def _choose(
    q, k, lse, own_importance, cu_seqlens, cu_seqlens_k, *,
    block_size, block_count, window_size, scale, spread,
):  # fmt: skip
    """Chosen blocks int32 [G, N, block_count]."""
    blocks = torch.empty(k.shape[1], q.shape[0], block_count, dtype=torch.int32, device=q.device)
    if blocks.numel():
        with torch.cuda.device_of(q):
            launches = Launches(q, k, k, cu_seqlens, cu_seqlens_k, block_size=block_size, scale=scale)
            own = None if own_importance is None else own_importance.float().contiguous()
            launches.choose(lse.float().contiguous(), blocks, own, window_size, spread)
    return blocks


@_choose.register_fake
def _(q, k, *rest, block_count, **settings):
    return q.new_empty(k.shape[1], q.shape[0], block_count, dtype=torch.int32)


@_operator(
    "attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? blocks, Tensor? seen, Tensor cu_seqlens, Tensor cu_seqlens_k, *, "
    "str branch, int block_size, int window_size, bool reverse, float? scale) -> (Tensor, Tensor)",
)
def _attend(q, k, v, blocks, seen, cu_seqlens, cu_seqlens_k, *, branch, **settings):
    """o [N, H, D] and lse fp32 [N, H] of one branch; where an argument is not named, it does not matter.

    compressed, remainder    block_size; of the latter also blocks int32 [G, N, count], which are left out
    selected                 blocks, block_size
    window                   window_size
    prefix                   seen int32 [N]: the number of a sample's first keys that a query sees
    pooled                   block_size, reverse: k and v are block means
    """
    o, lse = _results(q)
    if o.numel():
        with torch.cuda.device_of(q):
            launches = Launches(q, k, v, cu_seqlens, cu_seqlens_k, blocks=blocks, seen=seen, **settings)
            launches.attend(branch, o, lse)
    return o, lse


def _results(q):
    """Empty o [N, H, D] and lse [N, H]."""
    n, heads, dim = q.shape  # not len(q), which a compiler would fix
    return q.new_empty(n, heads, dim), q.new_empty(n, heads, dtype=torch.float32)


@_attend.register_fake
def _(q, *rest, **settings):
    return _results(q)


@_operator(
    "attend_gated",
    "(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor cu_seqlens, Tensor cu_seqlens_k, *, "
    "int block_size, int block_count, int window_size, float? scale, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_gated(q, k, v, gates, cu_seqlens, cu_seqlens_k, *, block_count, save, **settings):
    """The gated sum [N, H, D] of BRANCHES, and what its backward pass needs: their outputs [3, N, H, D], lse [3, N, H]
    and the chosen blocks [G, N, block_count], -1 if `chooses_all`. Without `save`, all but lse are empty."""
    out, outputs, lse, chosen = _gated_results(q, k, block_count, save)
    if out.numel():
        with torch.cuda.device_of(q):
            if chooses_all(k.shape[0], settings["block_size"], block_count):
                chosen.fill_(-1)
                blocks = None
            else:
                blocks = chosen if save else chosen.new_empty(k.shape[1], q.shape[0], block_count)
            launches = Launches(q, k, v, cu_seqlens, cu_seqlens_k, blocks=blocks, **settings)
            launches.attend_gated(gates.contiguous(), out, outputs if save else (None,) * len(BRANCHES), lse)
    return out, outputs, lse, chosen


def _gated_results(q, k, block_count, save):
    """Empty results, see `_attend_gated`."""
    n, heads, dim = q.shape
    saved = n if save else 0
    return (
        q.new_empty(n, heads, dim),
        q.new_empty(len(BRANCHES), saved, heads, dim),
        q.new_empty(len(BRANCHES), n, heads, dtype=torch.float32),
        q.new_empty(k.shape[1], saved, block_count, dtype=torch.int32),
    )


@_attend_gated.register_fake
def _(q, k, *rest, block_count, save, **settings):
    return _gated_results(q, k, block_count, save)


@_operator(
    "attend_backward",
    "(Tensor d_out, Tensor? d_lse, Tensor outputs, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? gates, "
    "Tensor? blocks, Tensor? seen, Tensor cu_seqlens, Tensor cu_seqlens_k, *, str[] branches, int block_size, "
    "int window_size, bool reverse, float? scale, bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    d_out, d_lse, outputs, lse, q, k, v, gates, blocks, seen, cu_seqlens, cu_seqlens_k, *,
    branches, need_q, need_kv, **settings,
):  # fmt: skip
    """Gradients of q, k and v, empty if not needed, and of gates, fp32 [N, H, branches], from the branches' outputs
    [branches, N, H, D] and lse [branches, N, H].

    Without gates, there is one branch, and d_lse [N, H] may be given, too. With gates, blocks are those that
    `_attend_gated` chose.
    """
    dq, dk, dv, d_gates = _gradients(d_out, outputs, q, k, need_q, need_kv)
    if d_out.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), d_gates
    if gates is not None and chooses_all(k.shape[0], settings["block_size"], blocks.shape[2]):
        blocks = None
    with torch.cuda.device_of(q):
        launches = Gradients(q, k, v, cu_seqlens, cu_seqlens_k, blocks=blocks, seen=seen, **settings)
        launches.run(branches, d_out.contiguous(), d_lse, gates, outputs, lse, dq, dk, dv, d_gates)
    return dq, dk, dv, d_gates


def _gradients(d_out, outputs, q, k, need_q, need_kv):
    """Empty results, see `_attend_backward`."""
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    d_gates = q.new_empty(*d_out.shape[:2], outputs.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape if need_q else 0), dk, dv, d_gates


@_attend_backward.register_fake
def _(d_out, d_lse, outputs, lse, q, k, *rest, need_q, need_kv, **settings):
    return _gradients(d_out, outputs, q, k, need_q, need_kv)


def _save_attend(ctx, inputs, keyword_only_inputs, output):
    q, k, v, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, None, *rest)
    ctx.settings = dict(keyword_only_inputs)
    ctx.branches = [ctx.settings.pop("branch")]


def _save_attend_gated(ctx, inputs, keyword_only_inputs, output):
    q, k, v, gates, *places = inputs
    _, outputs, lse, blocks = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(outputs, lse, q, k, v, gates, blocks, None, *places)
    ctx.settings = {name: keyword_only_inputs[name] for name in ("block_size", "window_size", "scale")}
    ctx.settings["reverse"] = False
    ctx.branches = list(BRANCHES)


def _backward_attend(ctx, d_out, d_lse):
    outputs, lse, *inputs = ctx.saved_tensors
    if d_out is None and d_lse is None:
        return (None,) * 7
    d_out = torch.zeros_like(outputs) if d_out is None else d_out
    return *_backward(ctx, d_out, d_lse, outputs[None], lse[None], inputs)[:3], *(None,) * 4


def _backward_attend_gated(ctx, d_out, *_):
    outputs, lse, *inputs = ctx.saved_tensors
    if d_out is None:
        return (None,) * 6
    *gradients, d_gates = _backward(ctx, d_out, None, outputs, lse, inputs)
    gates = inputs[3]
    return *gradients, d_gates.to(gates.dtype) if ctx.needs_input_grad[3] else None, None, None


def _backward(ctx, d_out, d_lse, outputs, lse, inputs):
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    settings = {"branches": ctx.branches, **ctx.settings, "need_q": need_q, "need_kv": need_k or need_v}
    dq, dk, dv, d_gates = _attend_backward(d_out, d_lse, outputs, lse, *inputs, **settings)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, d_gates


_attend.register_autograd(_backward_attend, setup_context=_save_attend)
_attend_gated.register_autograd(_backward_attend_gated, setup_context=_save_attend_gated)
