"""Native Sparse Attention as Triton kernels: the functions of `nsa_torch.py`, with the same arguments and results.

Forward, for a *tile*, which is a run of adjacent queries of one sample (r query heads share a KV head):
  compression  block means, then flash attention of a tile over them, head by head   `_means_kernel`, `_band_kernel`
  choice       importance of the blocks for a chunk of tiles; the top ones by bisection  `_importance_`, `_top_kernel`
               where it goes by means and variances, first what it is a share of               `_estimate_kernel`
  selection    the union of a tile's blocks, each with the set of queries that chose it              `_union_kernel`
               flash attention of a tile's r heads as rows over that union                        `_selected_kernel`
  window       flash attention of a tile over a band of keys, head by head                            `_band_kernel`
Each branch adds its gated share to the output. Backward, from inputs, branch outputs, lse and chosen blocks:
  gates        d_out · o per branch: the gradient of its gate, and what its softmax subtracts         `_dots_kernel`
  dq           the forward's tiles again, each branch adding to the last       `_band_dq_kernel`, `_selected_dq_kernel`
  dk, dv       a run of keys, over the queries that see it                                        `_band_dkv_kernel`
               a block, over the list of queries that chose it, cut into pieces               `_selected_dkv_kernel`
               all these partial sums added up in order                                           `_collect_kernel`
Nothing waits for the device and there are no atomics: results repeat exactly. Dots accumulate in fp32; those of fp32
inputs are IEEE. Gradients cannot be differentiated again; those of `nsa_torch.py` can.
"""

import functools
import hashlib
import math
import os

import torch

from .nsa_torch import check_arguments, check_block_count, check_text, head_by_head

try:
    import triton
    import triton.language as tl
except ImportError:  # importing this file must not fail: `available` then says no

    class tl:
        constexpr = None

    triton = None

MAX_IMPORTANCE = 2**26  # importance values of a chunk of tiles: 256 MB in fp32
MAX_PARTIAL = 2**26  # partial sums of dk and dv for a chunk of KV heads: 256 MB in fp32, or one head's if they are more
MAX_LIST = 1024  # queries of a piece of a block's list
MIN_PROGRAMS = 1024  # into which dk and dv of the compression are split, by queries, while these are enough
LOG2_E = 1.4426950408889634
_POOLED = ("pooled", "reversed")  # branches whose keys and values are block means already


def available(q: torch.Tensor) -> bool:
    """Whether the kernels can serve such queries: on an NVIDIA GPU from sm_80 on; fp16, bf16 or fp32; head dim 16 to
    128."""
    return triton is not None and q.device.type == "cuda" and _has_kernels(q.device) and _is_supported(q)


def nsa_attention(
    q, k, v, gates, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, block_count=32, window_size=256, scale=None,
):  # fmt: skip
    """See `nsa_torch.nsa_attention`."""
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    return _call("all", q, k, v, cu_seqlens, cu_seqlens_k, scale, gates=gates, **sizes)[0]


def compressed_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, block_size=64, scale=None):
    """See `nsa_torch.compressed_attention`. Block means are rounded to the dtype of k."""
    return _call("compressed", q, k, v, cu_seqlens, cu_seqlens_k, scale, block_size=block_size)


@torch.no_grad()
def select_blocks(
    q, k, lse, cu_seqlens, *,
    cu_seqlens_k=None, block_size=64, block_count=32, window_size=None, spread=False,
    own_importance=None, scale=None,
):  # fmt: skip
    """See `nsa_torch.select_blocks`."""
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    given = {"lse": lse, "own_importance": own_importance}
    _check(q, k, None, cu_seqlens, cu_seqlens_k, scale=scale, **given, **sizes)
    window_size = block_size + 1 if window_size is None else window_size
    check_block_count(block_count, block_size, window_size)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    options = (block_size, block_count, window_size, spread, scale)
    return _choose(q, k, lse, own_importance, cu_seqlens, cu_seqlens_k, *options)


def selected_attention(q, k, v, blocks, cu_seqlens, *, cu_seqlens_k=None, block_size=64, scale=None):
    """See `nsa_torch.selected_attention`."""
    sizes = {"blocks": blocks, "block_size": block_size}
    return _call("selected", q, k, v, cu_seqlens, cu_seqlens_k, scale, **sizes)


def window_attention(q, k, v, cu_seqlens, *, cu_seqlens_k=None, window_size=256, scale=None):
    """See `nsa_torch.window_attention`."""
    return _call("window", q, k, v, cu_seqlens, cu_seqlens_k, scale, window_size=window_size)


def pooled_attention(q, k, v, *, first, block_size=64, reverse=False, scale=None):
    """See `nsa_torch.pooled_attention`."""
    _check(q, k, v, None, None, first=first, block_size=block_size, scale=scale)
    cu_seqlens, cu_seqlens_k = (
        torch.arange(2, dtype=torch.int32, device=q.device) * n for n in (len(q), first + len(q))
    )
    branch = "reversed" if reverse else "pooled"
    return _launch(branch, q, k, v, cu_seqlens, cu_seqlens_k, scale, block_size=block_size)


def merged_attention(
    q, k, v, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, *,
    cu_seqlens_k=None, block_size=64, block_count=32, window_size=256, spread=True, per_head=False,
    remainder=False, scale=None,
):  # fmt: skip
    """See `nsa_torch.merged_attention`. The softmax is put together from one over the blocks, one over the text, and
    one over the means of the `remainder`."""
    sizes = {"block_size": block_size, "block_count": block_count, "window_size": window_size}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, scale=scale, **sizes)
    check_text(q, k, text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text, read_lengths=_reads_lengths(q))
    if per_head and q.shape[1] > k.shape[1]:
        places = (text_k, text_v, text_seen, cu_seqlens, cu_seqlens_text)
        options = {**sizes, "cu_seqlens_k": cu_seqlens_k, "spread": spread, "remainder": remainder, "scale": scale}
        return head_by_head(merged_attention, q, k, v, *places, **options)
    lengths = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    options = (block_size, 0, max(1, k.shape[0]), scale, False)
    text_lse = q.new_full((1, *q.shape[:2]), -torch.inf, dtype=torch.float32)
    if text_k.shape[0] > 0:
        part = (q, text_k, text_v, None, text_seen, cu_seqlens, cu_seqlens_text, "prefix", *options)
        text_out, text_lse, *_ = _attend(*part)
    with torch.no_grad():
        lse = text_lse[0]
        if not spread:
            _, lse = compressed_attention(q, k, v, **lengths, block_size=block_size, scale=scale)
        blocks = select_blocks(q, k, lse, **lengths, **sizes, spread=spread, scale=scale)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    out, lse, *_ = _attend(q, k, v, None, blocks, cu_seqlens, cu_seqlens_k, "selected", *options)
    if text_k.shape[0] > 0:
        out, lse = _merge(out, lse, text_out, text_lse)
    if remainder:
        part = (q, k, v, None, blocks, cu_seqlens, cu_seqlens_k, "remainder", *options)
        others, others_lse, *_ = _attend(*part)
        out, lse = _merge(out, lse, others, others_lse + math.log(block_size))
    return out


def _merge(o, lse, other, other_lse):
    """Of two softmaxes over different keys, o [N, H, D] and lse [1, N, H], the one over all of them."""
    weight = torch.sigmoid(other_lse - lse)[0].unsqueeze(-1)
    return torch.lerp(o, other, weight.to(o.dtype)), torch.logaddexp(lse, other_lse)


def _call(branch, q, k, v, cu_seqlens, cu_seqlens_k, scale, *, gates=None, blocks=None, **sizes):
    """Check the arguments of `_launch` first."""
    optional = {"scale": scale, "gates": gates, "blocks": blocks}
    _check(q, k, v, cu_seqlens, cu_seqlens_k, **optional, **sizes)
    return _launch(branch, q, k, v, cu_seqlens, cu_seqlens_k, scale, gates=gates, blocks=blocks, **sizes)


def _launch(branch, q, k, v, cu_seqlens, cu_seqlens_k, scale, *, gates=None, blocks=None, **sizes):
    """o and lse of a branch ("compressed", "selected", "window", "pooled", "reversed"), or the gated sum of "all" of
    the first three."""
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    sizes = [sizes.get(name, default) for name, default in (("block_size", 64), ("block_count", 0), ("window_size", 0))]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gates))
    out, lse, *_ = _attend(q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, branch, *sizes, scale, save)
    return out, lse[0].detach()


def _check(q, k, v, cu_seqlens, cu_seqlens_k, **arguments):
    if triton is None:
        raise ImportError("nsa_triton needs triton (pip install triton); nsa_torch computes the same without it")
    if not _can_launch(q.device):
        raise ValueError(f"q must be on a CUDA device for the Triton kernels, got {q.device}; nsa_torch runs anywhere")
    check_arguments(q, k, v, cu_seqlens, cu_seqlens_k, read_lengths=_reads_lengths(q), **arguments)
    if not _is_supported(q):
        raise ValueError(
            "q must be fp16, bf16 or fp32 with a head dim of 16 to 128 for the Triton kernels, "
            f"got {q.dtype} {list(q.shape)}; nsa_torch takes others"
        )


def _reads_lengths(q: torch.Tensor) -> bool:
    """Not on a GPU, which that would wait for."""
    return q.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_supported(q: torch.Tensor) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and 16 <= q.shape[-1] <= 128


@torch.compiler.assume_constant_result  # a compiler cannot look into what asks the device
def _has_kernels(device: torch.device) -> bool:
    return torch.version.hip is None and _capability(device) >= (8, 0)


def _can_launch(device: torch.device) -> bool:
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


# Operators, so that torch.compile sees one node. Remote code may be imported next to an installed package, and again:
# each import registers under a name of its own.
_namespace = "videonsa_" + hashlib.sha1(__name__.encode(), usedforsecurity=False).hexdigest()[:8]
while hasattr(getattr(torch.ops, _namespace), "attend"):
    _namespace += "_"


@torch.library.custom_op(
    f"{_namespace}::choose",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor lse, Tensor? own_importance, Tensor cu_seqlens, Tensor cu_seqlens_k, "
    "int block_size, int block_count, int window_size, bool spread, float? scale) "
    "-> Tensor",
)
def _choose(
    q, k, lse, own_importance, cu_seqlens, cu_seqlens_k, block_size, block_count, window_size, spread,
    scale,
):  # fmt: skip
    """Chosen blocks int32 [G, N, block_count]."""
    blocks = torch.empty(k.shape[1], q.shape[0], block_count, dtype=torch.int32, device=q.device)
    if blocks.numel():
        with torch.cuda.device_of(q):
            call = _Call(q, k, k, cu_seqlens, cu_seqlens_k, block_size, scale)
            own = None if own_importance is None else own_importance.float().contiguous()
            call.choose(lse.float().contiguous(), blocks, own, window_size, spread)
    return blocks


@_choose.register_fake
def _(q, k, lse, own_importance, cu_seqlens, cu_seqlens_k, block_size, block_count, *rest):
    return q.new_empty(k.shape[1], q.shape[0], block_count, dtype=torch.int32)


@torch.library.custom_op(
    f"{_namespace}::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? gates, Tensor? blocks, Tensor cu_seqlens, Tensor cu_seqlens_k, "
    "str branch, int block_size, int block_count, int window_size, float? scale, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend(
    q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, branch, block_size, block_count, window_size,
    scale, save,
):  # fmt: skip
    """o [N, H, D], and lse [branches, N, H], of one branch or of "all", gated.

    The branch "prefix" is attention over the first keys of a sample, as many as `blocks`, here [N], says of each query;
    "remainder" is that of "compressed" without the blocks given.

    With `save`, what the backward pass of "all" needs, too: the outputs of its branches [3, N, H, D] and the chosen
    blocks [G, N, block_count]; empty otherwise.
    """
    out, lse, branches, chosen = _results(q, k, branch, block_count, save)
    if out.numel() == 0:
        return out, lse, branches, chosen
    with torch.cuda.device_of(q):
        call = _Call(q, k, v, cu_seqlens, cu_seqlens_k, block_size, scale)
        if branch in _POOLED:
            call.means = call.k, call.v
        if branch in ("compressed", *_POOLED):
            call.compressed(out, lse[0], reverse=branch == "reversed")
        elif branch == "selected":
            call.selected(blocks.contiguous(), out, lse[0])
        elif branch == "window":
            call.window(out, lse[0], window_size)
        elif branch == "prefix":
            call.prefix(blocks.contiguous(), out, lse[0])
        elif branch == "remainder":
            call.skip(blocks)
            call.compressed(out, lse[0])
        else:
            blocks = chosen if save else chosen.new_empty(k.shape[1], q.shape[0], block_count)
            gates, keep = gates.contiguous(), branches if save else (None,) * 3
            call.compressed(out, lse[0], gates, 0, keep[0])
            call.choose(lse[0], blocks)
            call.selected(blocks, out, lse[1], gates, 1, keep[1])
            call.window(out, lse[2], window_size, gates, 2, keep[2])
    return out, lse, branches, chosen


def _results(q, k, branch, block_count, save):
    """Empty results for `_attend`."""
    n, heads, dim = q.shape  # a compiler fixes len(q)
    whole = branch == "all"
    return (
        q.new_empty(n, heads, dim),
        q.new_empty(3 if whole else 1, n, heads, dtype=torch.float32),
        q.new_empty(3 if whole and save else 0, n, heads, dim),
        q.new_empty(k.shape[1], n if whole and save else 0, block_count, dtype=torch.int32),
    )


@_attend.register_fake
def _(q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, branch, block_size, block_count, *rest):
    return _results(q, k, branch, block_count, save=rest[-1])


@torch.library.custom_op(
    f"{_namespace}::attend_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor? gates, Tensor? blocks, "
    "Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor outputs, Tensor lse, str branch, "
    "int block_size, int window_size, float? scale, bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    d_out, d_lse, q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, outputs, lse, branch, block_size,
    window_size, scale, need_q, need_kv,
):  # fmt: skip
    """Gradients of q, k, v, empty where not needed, and fp32 of the gates [N, H, 3] (of a single branch: [N, H, 1],
    its d_out · o), from the outputs [branches, N, H, D] and lse [branches, N, H] of the branches. d_lse is that of a
    single branch, [1, N, H]."""
    dq, dk, dv, d_gates = _gradients(d_out, q, k, outputs, need_q, need_kv)
    if d_out.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), d_gates
    with torch.cuda.device_of(q):
        inputs = (q, k, v, cu_seqlens, cu_seqlens_k, block_size, scale)
        _Backward(inputs, branch, d_out, d_lse, gates, blocks, outputs, lse, window_size).run(dq, dk, dv, d_gates)
    return dq, dk, dv, d_gates


def _gradients(d_out, q, k, outputs, need_q, need_kv):
    """Empty results for `_attend_backward`."""
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    d_gates = q.new_empty(*d_out.shape[:2], outputs.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape if need_q else 0), dk, dv, d_gates


@_attend_backward.register_fake
def _(d_out, d_lse, q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, outputs, *rest):
    return _gradients(d_out, q, k, outputs, *rest[-2:])


def _save(ctx, inputs, output):
    q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, branch, block_size, _, window_size, scale, _ = inputs
    out, lse, branches, chosen = output
    ctx.set_materialize_grads(False)
    whole = branch == "all"
    outputs, blocks = (branches, chosen) if whole else (out, blocks)
    ctx.save_for_backward(q, k, v, gates, blocks, cu_seqlens, cu_seqlens_k, outputs, lse)
    ctx.options = (branch, block_size, window_size, scale)


def _backward(ctx, d_out, d_lse, *_):
    if d_out is None and d_lse is None:
        return (None,) * 13
    *tensors, outputs, lse = ctx.saved_tensors
    d_out = torch.zeros_like(outputs) if d_out is None else d_out  # a single branch of which lse alone is used
    need_q, need_k, need_v, need_gates = ctx.needs_input_grad[:4]
    outputs = outputs if outputs.ndim == 4 else outputs[None]
    options = (*ctx.options, need_q, need_k or need_v)
    dq, dk, dv, d_gates = _attend_backward(d_out, d_lse, *tensors, outputs, lse, *options)
    d_gates = d_gates.to(tensors[3].dtype) if need_gates else None
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, d_gates, *(None,) * 9


_attend.register_autograd(_backward, setup_context=_save)


class _Call:
    """Kernel launches over one set of inputs: q [N, H, D]; k, v [M, G, D]."""

    def __init__(self, q, k, v, cu_seqlens, cu_seqlens_k, block_size, scale):
        (self.n, n_heads, dim), (self.n_keys, self.groups, _) = q.shape, k.shape
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        self.cu_seqlens, self.cu_seqlens_k = cu_seqlens.contiguous(), cu_seqlens_k.contiguous()
        self.block_size = block_size
        self.samples = len(cu_seqlens) - 1
        self.common = {  # arguments of every kernel that has a parameter of the name
            "CU_Q": self.cu_seqlens,
            "CU_K": self.cu_seqlens_k,
            "B": self.samples,
            "scale": (dim**-0.5 if scale is None else scale) * LOG2_E,
            "S": block_size,
            "H": n_heads,
            "G": self.groups,
            "D": dim,
            "D_P2": triton.next_power_of_2(dim),
            "B_P2": triton.next_power_of_2(self.samples),
            "SEEN": None,
            "SKIP": None,
            "WORDS": 0,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # the latter says nothing for 16-bit inputs
        }

    def launch(self, kernel, grid, *arguments, **constants):
        common = {name: self.common[name] for name in kernel.arg_names if name in self.common}
        kernel[grid](*arguments, **{**common, **constants}, enable_fp_fusion=True)  # the default is to change

    def tiles(self, size):
        """How many tiles of `size` queries there are at most; lengths stay on the device. Surplus ones do nothing."""
        return self.n // size + self.samples

    @functools.cached_property
    def pieces(self):
        """How many blocks there are at most, incomplete ones included."""
        return self.n_keys // self.block_size + self.samples

    @functools.cached_property
    def means(self):
        """Means of k and v over complete blocks, [blocks, G, D] in their dtype, sample by sample."""
        count = self.n_keys // self.block_size
        k_means, v_means = (x.new_empty(max(1, count), *x.shape[1:]) for x in (self.k, self.v))
        grid = (self.pieces, self.groups)
        self.launch(_means_kernel, grid, self.k, self.v, k_means, v_means, VARIANCE=False, num_warps=4)
        return k_means, v_means

    @functools.cached_property
    def moments(self):
        """Means of k, and the variances of its channels, over complete blocks. The latter, and the squares that they
        are multiplied with, are bf16 for 16-bit inputs: fp16 does not reach as far."""
        count = self.n_keys // self.block_size
        means = self.k.new_empty(max(1, count), *self.k.shape[1:])
        variances = torch.empty_like(means, dtype=torch.float32 if means.dtype == torch.float32 else torch.bfloat16)
        grid = (self.pieces, self.groups)
        self.launch(_means_kernel, grid, self.k, self.k, means, variances, VARIANCE=True, num_warps=4)
        return means, variances

    # A branch writes o [N, H, D] to `out`; with gates [N, H, 3] it adds its share of the gated sum to what branches of
    # lower number have written there, and writes o to `keep`, if given.

    def compressed(self, out, lse, gates=None, branch=0, keep=None, reverse=False):
        config = _config("compressed" if self.common["SKIP"] is None else "remainder", self.q)
        k_means, v_means = self.means
        grid = (self.tiles(config["BM"]), self.common["H"])
        config |= _share(out, gates, branch, keep)
        self.launch(_band_kernel, grid, self.q, k_means, v_means, out, lse, len(k_means), REVERSE=reverse, **config)

    def window(self, out, lse, window_size, gates=None, branch=0, keep=None):
        config = _config("window", self.q)
        grid = (self.tiles(config["BM"]), self.common["H"])
        config |= _share(out, gates, branch, keep)
        arguments = (self.q, self.k, self.v, out, lse, min(window_size, self.n_keys))
        self.launch(_band_kernel, grid, *arguments, S=1, REVERSE=False, **config)

    def prefix(self, seen, out, lse):
        config = _config("window", self.q)
        grid = (self.tiles(config["BM"]), self.common["H"])
        config |= {**_share(out, None, 0, None), "SEEN": seen}
        self.launch(_band_kernel, grid, self.q, self.k, self.v, out, lse, self.n_keys, S=1, REVERSE=False, **config)

    def choose(self, lse, blocks, own_importance=None, window_size=None, spread=False):
        """Write the choice into blocks [G, N, count], from the importance of a chunk of tiles at a time."""
        count, window_size = blocks.shape[2], self.block_size + 1 if window_size is None else window_size
        n_blocks = (self.n_keys - 1) // self.block_size + 1  # of any sample, at most
        config, top = _config("estimate" if spread else "importance", self.q), _top_config(n_blocks)
        rows = config["BM"]
        everything = n_blocks <= count  # then there is nothing to compare
        stride = triton.cdiv(n_blocks, 16) * 16  # so that rows are aligned
        size = self.groups * rows * stride  # of a tile
        step = max(1, MAX_IMPORTANCE // size)
        size = 0 if everything else min(step, self.tiles(rows)) * size
        importance = torch.empty(size, dtype=torch.float32, device=lse.device)
        if not everything:
            means, variances = self.moments if spread else (self.means[0], None)
            keys = (self.q, means, variances, math.sqrt(2 * math.log(self.block_size)))
            if spread:
                lse, others = torch.empty_like(lse), lse
                grid = (self.tiles(rows), self.common["H"])
                self.launch(_estimate_kernel, grid, *keys, others, lse, **config)
        for start in range(0, self.tiles(rows), step):
            tiles = min(step, self.tiles(rows) - start)
            if not everything:
                grid = (triton.cdiv(n_blocks, config["BN"]), tiles, self.groups)
                self.launch(_importance_kernel, grid, *keys, lse, importance, start, stride, **config)
            sizes = {"COUNT": count, "COUNT_P2": triton.next_power_of_2(count), "BM": rows, "EVERYTHING": everything}
            grid = (tiles * rows // top["ROWS"], self.groups)
            arguments = (importance, own_importance, blocks, start, stride, self.n, window_size)
            self.launch(_top_kernel, grid, *arguments, **sizes, **top)

    def skip(self, blocks):
        """Let the compression of queries go without their chosen blocks [G, N, count]: int32 [N, G, words] with a bit
        for each block."""
        words = (self.n_keys - 1) // self.block_size // 32 + 1
        there, blocks = (blocks >= 0).int(), blocks.clamp(0, 32 * words - 1)
        bits = torch.zeros(self.groups, self.n, words, dtype=torch.int32, device=blocks.device)
        bits.scatter_add_(2, (blocks // 32).long(), there << (blocks % 32))  # a block is chosen once
        self.common |= {"SKIP": bits.transpose(0, 1).contiguous(), "WORDS": words}

    def union(self, blocks, tile):
        """What `_union_kernel` gives for tiles of that many queries, and the entries that each has room for."""
        count, tiles = blocks.shape[2], self.tiles(tile)
        room = tile * count
        union, bits = torch.empty(2, self.groups, tiles, room, dtype=torch.int32, device=blocks.device)
        sizes = torch.empty(self.groups, tiles, 2, dtype=torch.int32, device=blocks.device)
        counts = {"COUNT": count, "ROOM": room, "ROOM_P2": triton.next_power_of_2(room)}
        arguments = (blocks, union, bits, sizes, self.n)
        self.launch(_union_kernel, (tiles, self.groups), *arguments, BQ=tile, **counts, num_warps=4)
        return (union, bits, sizes), room

    def selected_config(self, kernel):
        """Configuration of a kernel whose rows are queries times heads; at most 32 queries, which have a bit each.

        As many queries as fit: 18 of 7 heads fill 126 of 128 rows. In the kernel of dk and dv, which cuts rows into
        few queries at a time, heads are rounded up to a power of 2 instead: there nothing more would fit.
        """
        config = _config(kernel, self.q)
        heads = self.common["H"] // self.groups
        if kernel == "selected_dkv":
            heads = triton.next_power_of_2(heads)
        tile = max(1, min(config.pop("BM") // heads, 32))
        config["BN"] = min(config["BN"], self.block_size)
        return {**config, "BQ": tile, "EACH": heads, "ROWS": max(16, triton.next_power_of_2(tile * heads))}

    def selected(self, blocks, out, lse, gates=None, branch=0, keep=None):
        config = self.selected_config("selected")
        union, room = self.union(blocks, config["BQ"])
        grid = (self.tiles(config["BQ"]), self.groups)
        options = {"UNION": room, **_share(out, gates, branch, keep), **config}
        self.launch(_selected_kernel, grid, self.q, self.k, self.v, out, lse, *union, **options)


class _Backward(_Call):
    """Gradients through one branch or "all": d_out [N, H, D]; outputs [branches, N, H, D] and lse [branches, N, H]."""

    def __init__(self, inputs, branch, d_out, d_lse, gates, blocks, outputs, lse, window_size):
        super().__init__(*inputs)
        if branch in _POOLED:
            self.means = self.k, self.v
        self.branches = ("compressed", "selected", "window") if branch == "all" else (branch,)
        self.d_out, self.outputs, self.lse, self.window_size = d_out.contiguous(), outputs, lse, window_size
        self.d_lse = d_lse
        self.gates = None if gates is None else gates.contiguous()
        self.blocks = None if blocks is None else blocks.contiguous()
        if branch == "prefix":
            self.common["SEEN"] = self.blocks
        if branch == "remainder":
            self.skip(self.blocks)

    def run(self, dq, dk, dv, dots):
        """Write dq [N, H, D], dk and dv [M, G, D], unless they are empty, and dots [N, H, branches]: d_out · o."""
        rows = self.n * self.common["H"]
        arguments = (self.d_out, self.outputs, dots, rows)
        self.launch(_dots_kernel, (triton.cdiv(rows, 32),), *arguments, BRANCHES=len(self.branches), ROWS=32)
        if self.d_lse is not None:  # the gradient of a logit is p * (d_out · v - d_out · o + d_lse)
            dots -= self.d_lse[0].unsqueeze(-1)
        gates = dots if self.gates is None else self.gates
        constants = {"GATED": self.gates is not None, "BRANCHES": len(self.branches)}
        self.terms = {
            name: ((self.d_out, self.lse[index], gates, dots), {**constants, "BRANCH": index})
            for index, name in enumerate(self.branches)
        }
        if dq.numel():
            self.query_gradients(dq)
        if dk.numel():
            self.key_gradients(dk, dv)

    def query_gradients(self, dq):
        for index, name in enumerate(self.branches):
            tensors, constants = self.terms[name]
            constants = {**constants, "ADD": index > 0}
            if name == "selected":
                config = self.selected_config("selected_dq")
                union, room = self.union(self.blocks, config["BQ"])
                grid = (self.tiles(config["BQ"]), self.groups)
                arguments = (self.q, self.k, self.v, dq, *tensors, *union)
                self.launch(_selected_dq_kernel, grid, *arguments, UNION=room, **constants, **config)
            else:
                config = _config("remainder_dq" if name == "remainder" else "band_dq", self.q)
                k, v, window, size = self.band(name)
                grid = (self.tiles(config["BM"]), self.common["H"])
                arguments = (self.q, k, v, dq, *tensors, window)
                constants |= {"S": size, "REVERSE": name == "reversed"}
                self.launch(_band_dq_kernel, grid, *arguments, **constants, **config)

    def key_gradients(self, dk, dv):
        """Partial sums of every branch in fp32, then all of them added up."""
        if self.branches[0] in (*_POOLED, "prefix"):
            for gradient, partial in zip((dk, dv), self.band_partial(self.branches[0]), strict=True):
                gradient.copy_(partial.sum(0))
            return
        nothing = (dk, dv)
        window = self.band_partial("window") if "window" in self.branches else nothing
        pooled = next((name for name in ("compressed", "remainder") if name in self.branches), None)
        means = self.band_partial(pooled) if pooled else nothing
        selected, first_piece, step = nothing, self.cu_seqlens, self.groups
        if "selected" in self.branches:
            pieces = self.n * self.blocks.shape[2] // MAX_LIST + self.pieces  # of lists, for a KV head, at most
            step = max(1, MAX_PARTIAL // (2 * pieces * self.block_size * dk.shape[2]))
        for g in range(0, self.groups, step):
            count = min(step, self.groups - g)
            if "selected" in self.branches:
                selected, first_piece = self.selected_partial(g, count, count * pieces)
            rows = min(self.block_size, 64)
            grid = (self.pieces, count, self.block_size // rows)
            arguments = (*window, *means, *selected, first_piece, dk, dv, len(means[0]), means[0].shape[-3], g)
            present = {name.upper(): name in self.branches for name in ("selected", "window")}
            self.launch(_collect_kernel, grid, *arguments, BN=rows, COMPRESSED=bool(pooled), **present, num_warps=8)
            del selected, arguments  # before the next ones are allocated

    def band(self, name):
        """Keys, values, how many of them a query looks back on, and how many tokens each stands for."""
        if name == "prefix":
            return self.k, self.v, self.n_keys, 1
        if name == "window":
            return self.k, self.v, min(self.window_size, self.n_keys), 1
        return *self.means, len(self.means[0]), self.block_size

    def band_partial(self, name):
        """Partial sums fp32 [2, splits of the queries, keys, G, D]."""
        tensors, constants = self.terms[name]
        config = _config("remainder_dkv" if name == "remainder" else "band_dkv", self.q)
        k, v, window, size = self.band(name)
        tiles = triton.cdiv(len(k), config["BN"]) + self.samples
        splits = 1
        if name != "window":  # few keys, each seen by many queries
            splits = max(1, min(MIN_PROGRAMS // (tiles * self.groups), triton.cdiv(self.n, 4 * config["BM"])))
        partial = torch.empty(2, splits, *k.shape, dtype=torch.float32, device=k.device)
        grid = (tiles, self.groups, splits)
        arguments = (self.q, k, v, *partial, *tensors, window, len(k))
        self.launch(_band_dkv_kernel, grid, *arguments, S=size, REVERSE=name == "reversed", **constants, **config)
        return partial

    def selected_partial(self, g, count, pieces):
        """Partial sums fp32 [2, pieces, S, D] for `count` KV heads from g on, and the first piece of each list."""
        tensors, constants = self.terms["selected"]
        queries, list_of, start_of, offsets, first_piece = self.lists(self.blocks[g : g + count], pieces)
        size = (2, pieces, self.block_size, self.k.shape[2])
        partial = torch.empty(size, dtype=torch.float32, device=self.k.device)
        config = self.selected_config("selected_dkv")
        grid = (pieces, self.block_size // config["BN"])
        lists = (queries, list_of, start_of, offsets, g, self.pieces)
        arguments = (self.q, self.k, self.v, *partial, *tensors, *lists)
        self.launch(_selected_dkv_kernel, grid, *arguments, LIST=MAX_LIST, **constants, **config)
        return partial, first_piece

    @functools.cached_property
    def blocks_of_queries(self):
        """For each query, the first block of its sample, of all blocks, and how many there are; int [N] each."""
        in_sample = (self.cu_seqlens_k.diff() + self.block_size - 1) // self.block_size
        query = torch.arange(self.n, dtype=torch.int32, device=self.q.device)
        sample = torch.searchsorted(self.cu_seqlens[1:], query, right=True)
        return (in_sample.cumsum(0) - in_sample)[sample], in_sample[sample]

    def lists(self, blocks, pieces):
        """From blocks [g, N, count], for each of g KV heads and each block the list of queries that chose it.

        Returns int32: queries, list by list, ascending (-1 for a repetition); for each piece of a list its list, or
        -1, and where it starts; where each list starts, and which piece of it is the first, both with an end.
        """
        groups, n, count = blocks.shape
        device, total = blocks.device, groups * self.pieces
        first, in_sample = self.blocks_of_queries
        there = (blocks >= 0) & (blocks < in_sample[:, None])
        head = torch.arange(groups, device=device)[:, None, None] * self.pieces
        key = torch.where(there, blocks + first[:, None] + head, total).int()
        key, order = key.flatten().sort(stable=True)
        queries = (order % (n * count) // count).int()
        again = (key[1:] == key[:-1]) & (queries[1:] == queries[:-1])
        queries[1:].masked_fill_(again, -1)
        offsets = torch.searchsorted(key, torch.arange(total + 1, dtype=torch.int32, device=device))
        per_list = (offsets.diff() + MAX_LIST - 1) // MAX_LIST
        last = per_list.cumsum(0)
        piece = torch.arange(pieces, device=device)
        list_of = torch.searchsorted(last, piece, right=True)
        at = list_of.clamp(max=total - 1)
        start_of = offsets[at] + (piece - (last - per_list)[at]) * MAX_LIST
        list_of = list_of.masked_fill(list_of == total, -1)
        first_piece = torch.nn.functional.pad(last, (1, 0))
        return queries, *(x.int() for x in (list_of, start_of, offsets, first_piece))


def _share(out, gates, branch, keep) -> dict:
    """What `_store_share` needs to know, by name."""
    sharing = {"GATED": gates is not None, "BRANCH": branch, "KEEP": keep is not None}
    return {"GATES": out if gates is None else gates, "KEPT": out if keep is None else keep, **sharing}


# Rows (queries, or queries times heads) and keys of a tile, by what compiles without spilling at a head dim of 128:
# where a program has 227 KB of shared memory, and where it has 99 KB or an architecture is not known.
_HOPPER = {
    "compressed": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "remainder": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 3},
    "importance": {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
    "estimate": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "selected": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "window": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "band_dq": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "remainder_dq": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 3},
    "band_dkv": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3},
    "remainder_dkv": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2},
    "selected_dq": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "selected_dkv": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3},
}
_AMPERE = {
    "compressed": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "remainder": {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2},
    "importance": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "estimate": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
    "selected": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "window": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "band_dq": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "remainder_dq": {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2},
    "band_dkv": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2},
    "remainder_dkv": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2},
    "selected_dq": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "selected_dkv": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 1},
}
_FP32 = dict.fromkeys(_HOPPER, {"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 1})


def _config(kernel: str, q: torch.Tensor) -> dict:
    """Tile sizes and launch options of a kernel for the device and dtype of q; never by sequence length."""
    if q.dtype == torch.float32:
        return dict(_FP32[kernel])
    return dict((_HOPPER if _capability(q.device)[0] in (9, 10) else _AMPERE)[kernel])


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _top_config(n_blocks: int) -> dict:
    """A row of importance lives in registers, 64 values per thread; short rows share a warp's program."""
    width = max(triton.next_power_of_2(n_blocks), 16)
    return {"WIDTH": width, "ROWS": min(16, max(1, 1024 // width)), "num_warps": min(16, max(1, width // 2048))}


def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _load(pointer, at, keep, D: tl.constexpr, D_P2: tl.constexpr, MASK: tl.constexpr):
    """Rows [n, D_P2] at the offsets `at` [n]; 0 beyond D, and where `keep` [n] is false if MASK says that matters."""
    d = tl.arange(0, D_P2)
    where = pointer + at[:, None] + d[None, :]
    if MASK and D == D_P2:
        x = tl.load(where, mask=keep[:, None], other=0.0)
    elif MASK:
        x = tl.load(where, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    elif D == D_P2:
        x = tl.load(where)
    else:
        x = tl.load(where, mask=tl.broadcast_to((d < D)[None, :], where.shape), other=0.0)
    return x


@_jit
def _store(pointer, at, keep, x, D: tl.constexpr, D_P2: tl.constexpr):
    d = tl.arange(0, D_P2)
    tl.store(pointer + at[:, None] + d[None, :], x.to(pointer.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@_jit
def _softmax_step(acc, top, total, x, v, scale, on, PRECISION: tl.constexpr):
    """Online softmax over a tile of keys: logits x [R, n] (times `scale`, in units of log 2; -inf where masked), values
    v [n, D]. Rows where `on` [R] is false do not take part: their shift is +inf, which costs less than a mask."""
    new_top = tl.where(on, tl.maximum(top, tl.max(x, 1) * scale), top)
    p = tl.math.exp2(x * scale - tl.where(on, new_top, float("inf"))[:, None])
    old = tl.math.exp2(top - new_top)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
    return acc, new_top, total * old + tl.sum(p, 1)


@_jit
def _finish(acc, top, total):
    """o [R, D] and the natural log-sum-exp [R] of an online softmax; 0 and -inf where there was no key."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, (top + tl.math.log2(total)) * 0.6931471805599453, float("-inf"))


@_jit
def _place(tile, CU_Q, CU_K, B, SIZE: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, B_P2: tl.constexpr):
    """Where a tile stands that holds SIZE queries, or SIZE runs of UNIT keys if UNIT is not 0.

    Returns the first of them within the sample; the sample's first query, first key and first block of S; its number
    of queries and of keys. For a surplus tile both are 0, so that the first is beyond them.
    """
    b = tl.arange(0, B_P2)
    q0 = tl.load(CU_Q + b, mask=b < B, other=0)
    n_q = tl.load(CU_Q + b + 1, mask=b < B, other=0) - q0
    k0 = tl.load(CU_K + b, mask=b < B, other=0)
    n_k = tl.load(CU_K + b + 1, mask=b < B, other=0) - k0
    tiles = (n_q + SIZE - 1) // SIZE
    if UNIT > 0:
        tiles = (n_k // UNIT + SIZE - 1) // SIZE
    end = tl.cumsum(tiles, 0)
    here = (end > tile) & (end - tiles <= tile)
    first = (tile - tl.sum(tl.where(here, end - tiles, 0), 0)) * SIZE
    block0 = tl.sum(tl.where(end <= tile, n_k // S, 0), 0)
    q0 = tl.sum(tl.where(here, q0, 0), 0)
    k0 = tl.sum(tl.where(here, k0, 0), 0)
    return first, q0, k0, block0, tl.sum(tl.where(here, n_q, 0), 0), tl.sum(tl.where(here, n_k, 0), 0)


@_jit
def _means_kernel(
    K, V, KM, VM, CU_Q, CU_K, B,
    G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    """Mean of a block of k and v, or with VARIANCE the variance of v: KM, VM [blocks, G, D]."""
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(tl.program_id(0), CU_Q, CU_K, B, S, 1, S, B_P2)
    if first + S <= n_k:
        at = ((k0 + first + tl.arange(0, S)).to(tl.int64) * G + g) * D
        d = tl.arange(0, D_P2)
        out = ((block0 + first // S).to(tl.int64) * G + g) * D + d
        k = tl.sum(_load(K, at, at >= 0, D, D_P2, False).to(tl.float32), 0) / S
        tl.store(KM + out, k.to(KM.dtype.element_ty), mask=d < D)
        x = _load(V, at, at >= 0, D, D_P2, False).to(tl.float32)
        v = tl.sum(x, 0) / S
        if VARIANCE:
            x -= v[None, :]
            v = tl.sum(x * x, 0) / S
        tl.store(VM + out, v.to(VM.dtype.element_ty), mask=d < D)


@_jit
def _row(start, i, n, REVERSE: tl.constexpr):
    """Where the i-th of a sample's n queries or keys stands, which start at `start`."""
    if REVERSE:
        i = n - 1 - i
    return (start + i).to(tl.int64)


@_jit
def _band_kernel(
    Q, K, V, OUT, LSE, window, SEEN, SKIP, GATES, KEPT, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    GATED: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Attention of one head of a tile over the last `window` keys that end at or before each query, where a key stands
    for S tokens: block means (all of them are in the window) or, with S = 1, tokens. With REVERSE queries and keys are
    counted from their ends, so that a query sees those after it. If SEEN [N] is given, over the first keys of the
    sample instead, as many as it says; without the keys whose bits in SKIP [N, G, WORDS] are set."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    h = tl.program_id(1)
    first, q0, k0, key0, n_q, n_k = _place(tile, CU_Q, CU_K, B, BM, 0, S, B_P2)
    if first < n_q:
        g = h // (H // G)
        m = first + tl.arange(0, BM)
        row = m < n_q
        seen = _seen(SEEN, q0, m, n_q, n_k, S)
        q = _load(Q, (_row(q0, m, n_q, REVERSE) * H + h) * D, row, D, D_P2, True)
        acc = tl.zeros((BM, D_P2), tl.float32)
        top = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        j = tl.arange(0, BN)
        by_first = _seen(SEEN, q0, first, n_q, n_k, S)
        by_last = _seen(SEEN, q0, tl.minimum(first + BM, n_q) - 1, n_q, n_k, S)
        low = tl.maximum(by_first - window, 0)
        free = tl.where(by_last <= window, by_first // BN * BN, low)  # every row sees the keys up to here
        for start in range(low, free, BN):
            at = (_row(key0, start + j, n_k // S, REVERSE) * G + g) * D
            x = tl.dot(q, tl.trans(_load(K, at, row, D, D_P2, False)), input_precision=PRECISION)
            x = _skip(x, SKIP, (q0 + m).to(tl.int64) * G + g, row, start + j, WORDS)
            v = _load(V, at, row, D, D_P2, False)
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, row, PRECISION)
        for start in range(free, by_last, BN):
            at = (_row(key0, start + j, n_k // S, REVERSE) * G + g) * D
            there = start + j < by_last
            x = tl.dot(q, tl.trans(_load(K, at, there, D, D_P2, True)), input_precision=PRECISION)
            key = (start + j)[None, :]
            x = tl.where((key < seen[:, None]) & (key >= (seen - window)[:, None]), x, float("-inf"))
            x = _skip(x, SKIP, (q0 + m).to(tl.int64) * G + g, row, start + j, WORDS)
            v = _load(V, at, there, D, D_P2, True)
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, row, PRECISION)
        o, lse = _finish(acc, top, total)
        at = _row(q0, m, n_q, REVERSE) * H + h
        tl.store(LSE + at, lse, mask=row)
        _store_share(OUT, KEPT, GATES, at, row, o, D, D_P2, GATED, BRANCH, KEEP)


@_jit
def _seen(SEEN, q0, m, n_q, n_k, S: tl.constexpr):
    """How many keys queries m of a sample see, of `_band_kernel`."""
    if SEEN is None:  # noqa: SIM108 (decided when compiling)
        seen = (n_k - n_q + m + 1) // S
    else:
        seen = tl.load(SEEN + q0 + m, mask=m < n_q, other=0)
    return seen


@_jit
def _skip(x, SKIP, at, row, key, WORDS: tl.constexpr):
    """Logits x [R, n] of rows `at` of [N, G], -inf for the keys [n] whose bit is set."""
    if SKIP is not None:
        x = tl.where(_is_skipped(SKIP, at[:, None], row[:, None], key[None, :], WORDS), float("-inf"), x)
    return x


@_jit
def _is_skipped(SKIP, at, row, key, WORDS: tl.constexpr):
    """Whether the bits of keys are set in rows `at` of SKIP [N, G]; keys, rows, and whether there is such a row are
    2D, to be broadcast."""
    word = tl.load(SKIP + at * WORDS + key // 32, mask=row & (key < 32 * WORDS), other=0)
    return ((word >> (key % 32)) & 1) != 0


@_jit
def _block_scores(
    q, k, at, there, VARIANCES, most, scale, D: tl.constexpr, D_P2: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """What queries q [R, D] make of blocks, in units of log 2: their products with the means k [n, D], or, with the
    variances at `at` [n], the log-sum-exp estimated as in `nsa_torch._block_lse`."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if VARIANCES is not None:
        variance = _load(VARIANCES, at, there, D, D_P2, True)
        q = q.to(tl.float32)
        variance = tl.dot((q * q).to(variance.dtype), tl.trans(variance), input_precision=PRECISION) * (scale * scale)
        limit = most * 1.4426950408889634
        wide = most * tl.sqrt(variance)
        x += tl.where(variance < limit * limit, 0.34657359027997264 * (variance + limit * limit), wide)
    return x


@_jit
def _estimate_kernel(
    Q, KM, VARIANCES, most, OTHERS, LSE, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The natural log-sum-exp of one head of a tile over what OTHERS has and the blocks before its own: [N, H]."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # longest first
    h = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(tile, CU_Q, CU_K, B, BM, 0, S, B_P2)
    if first < n_q:
        g = h // (H // G)
        m = first + tl.arange(0, BM)
        row = m < n_q
        own = (n_k - n_q + m) // S
        last = (n_k - n_q + tl.minimum(first + BM, n_q) - 1) // S
        q = _load(Q, ((q0 + m).to(tl.int64) * H + h) * D, row, D, D_P2, True)
        at = (q0 + m).to(tl.int64) * H + h
        top = tl.load(OTHERS + at, mask=row, other=0.0) * 1.4426950408889634
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        top = tl.maximum(top, -1e30)
        j = tl.arange(0, BN)
        for start in range(0, last, BN):
            there = start + j < last
            keys = ((block0 + start + j).to(tl.int64) * G + g) * D
            k = _load(KM, keys, there, D, D_P2, True)
            x = _block_scores(q, k, keys, there, VARIANCES, most, scale, D, D_P2, PRECISION)
            x = tl.where((start + j)[None, :] < own[:, None], x, float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            total = total * tl.math.exp2(top - new_top) + tl.sum(tl.math.exp2(x - new_top[:, None]), 1)
            top = new_top
        tl.store(LSE + at, (top + tl.math.log2(tl.maximum(total, 1.0))) * 0.6931471805599453, mask=row)


@_jit
def _importance_kernel(
    Q, KM, VARIANCES, most, LSE, IMPORTANCE, tile0, stride, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Probabilities of BN blocks for a tile's queries, by `_block_scores` and LSE [N, H], summed over the heads of a KV
    head, one after another so that nothing is summed across rows: IMPORTANCE [G, rows of the chunk, stride]."""
    start = tl.program_id(0) * BN
    local = tl.program_id(1)
    g = tl.program_id(2)
    first, q0, k0, block0, n_q, n_k = _place(tile0 + local, CU_Q, CU_K, B, BM, 0, S, B_P2)
    own = (n_k - n_q + tl.minimum(first + BM, n_q) - 1) // S  # of the last query
    if (first < n_q) & (start < own):
        m = first + tl.arange(0, BM)
        row = m < n_q
        j = start + tl.arange(0, BN)
        at = ((block0 + j).to(tl.int64) * G + g) * D
        k = _load(KM, at, j < own, D, D_P2, True)
        importance = tl.zeros((BM, BN), tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            at_q = (q0 + m).to(tl.int64) * H + h
            q = _load(Q, at_q * D, row, D, D_P2, True)
            lse = tl.load(LSE + at_q, mask=row, other=0.0) * 1.4426950408889634
            x = _block_scores(q, k, at, j < own, VARIANCES, most, scale, D, D_P2, PRECISION)
            importance += tl.math.exp2(x - lse[:, None])
        out = (g * tl.num_programs(1) + local).to(tl.int64) * BM + tl.arange(0, BM)
        where = IMPORTANCE + out[:, None] * stride + j[None, :]
        tl.store(where, importance, mask=row[:, None] & (j < stride)[None, :])


@_jit
def _top_kernel(
    IMPORTANCE, OWN, BLOCKS, tile0, stride, n, window, CU_Q, CU_K, B,
    G: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, COUNT: tl.constexpr, COUNT_P2: tl.constexpr, BM: tl.constexpr,
    EVERYTHING: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The COUNT most important blocks of ROWS queries, ascending, -1 padded: BLOCKS [G, n, COUNT].

    Floats that are not negative order as their bits do, so a bisection on the bits finds the importance of the last
    block to choose in at most 31 steps, exactly; blocks of equal importance there are taken from the lowest index on.
    Block 0 and those that the last `window` tokens overlap are always chosen.
    """
    chunk_row = tl.program_id(0) * ROWS
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(tile0 + chunk_row // BM, CU_Q, CU_K, B, BM, 0, S, B_P2)
    m = first + chunk_row % BM + tl.arange(0, ROWS)
    row = m < n_q
    own = (n_k - n_q + m) // S
    j = tl.arange(0, WIDTH)
    there = row[:, None] & (j[None, :] <= own[:, None])
    if EVERYTHING:
        chosen = there
    else:
        rows = (g * (tl.num_programs(0) * ROWS) + chunk_row).to(tl.int64) + tl.arange(0, ROWS)
        before = row[:, None] & (j[None, :] < own[:, None])
        x = tl.load(IMPORTANCE + rows[:, None] * stride + j[None, :], mask=before, other=0.0)
        x = tl.where(x >= 0.0, x, 0.0)  # a NaN would order as any bits do, and COUNT be exceeded
        key = tl.minimum(x.to(tl.int32, bitcast=True), 0x7F800000)
        if OWN is None:
            forced = (j[None, :] == 0) | (j[None, :] >= ((n_k - n_q + m + 1 - window) // S)[:, None])
            key = tl.where(forced, 0x7F800000, key)  # infinity
        else:
            mine = tl.load(OWN + (g * n + q0 + m).to(tl.int64), mask=row, other=0.0).to(tl.int32, bitcast=True)
            key = tl.where(j[None, :] == own[:, None], mine[:, None], key)
        key = tl.where(there, key, -1)
        low = tl.zeros((ROWS,), tl.int32)  # at least COUNT keys are >= low, unless there are fewer in all
        high = tl.max(key, 1) + 1  # fewer than COUNT, or exactly as many as needed, are >= high
        n_low = tl.sum((key >= 0).to(tl.int32), 1)
        while tl.max(((high - low > 1) & (n_low > COUNT)).to(tl.int32), 0) > 0:
            middle = low + (high - low) // 2
            n_middle = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
            enough = n_middle >= COUNT
            low = tl.where(enough, middle, low)
            n_low = tl.where(enough, n_middle, n_low)
            high = tl.where(enough, high, middle)
        above = key >= high[:, None]
        equal = (key >= low[:, None]) & (key < high[:, None])
        left = COUNT - tl.sum(above.to(tl.int32), 1)
        rank = tl.cumsum(equal.to(tl.int32), 1)
        chosen = above | (equal & (rank <= left[:, None]))
    out = BLOCKS + ((g * n + q0 + m).to(tl.int64) * COUNT)[:, None]
    slot = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(out + slot, tl.broadcast_to(j[None, :], (ROWS, WIDTH)), mask=chosen)
    number = tl.sum(chosen.to(tl.int32), 1)
    s = tl.arange(0, COUNT_P2)
    empty = row[:, None] & (s[None, :] >= number[:, None]) & (s < COUNT)[None, :]
    tl.store(out + s[None, :], tl.full((ROWS, COUNT_P2), -1, tl.int32), mask=empty)


@_jit
def _union_kernel(
    BLOCKS, UNION, BITS, SIZES, n, CU_Q, CU_K, B,
    G: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, COUNT: tl.constexpr, ROOM: tl.constexpr,
    ROOM_P2: tl.constexpr,
):  # fmt: skip
    """The union of the blocks that a tile's queries chose.

    UNION [G, tiles, ROOM]: block indices, ascending; BITS: running sums (mod 2³²) of the sets of queries that chose
    each, a bit per query; SIZES [G, tiles, 2]: number of blocks, and of those that every query has behind it.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(tile, CU_Q, CU_K, B, BQ, 0, S, B_P2)
    e = tl.arange(0, ROOM_P2)
    m = first + e // COUNT
    there = (m < n_q) & (e < ROOM)
    block = tl.load(BLOCKS + (g * n + q0 + first).to(tl.int64) * COUNT + e, mask=there, other=-1)
    block = tl.where(block <= (n_k - n_q + m) // S, block, -1)  # of blocks given, some may be beyond the query's own
    key = tl.sort(tl.where(block >= 0, block * BQ + e // COUNT, 0x7FFFFFFF))
    valid = key != 0x7FFFFFFF
    block = key // BQ
    before = tl.gather(key, tl.maximum(e - 1, 0), 0)
    after = tl.gather(key, tl.minimum(e + 1, ROOM_P2 - 1), 0)
    new = valid & ((e == 0) | (block != before // BQ))
    last = valid & ((e == ROOM_P2 - 1) | (block != after // BQ))
    again = (e > 0) & (key == before)
    at = (g * tl.num_programs(0) + tile).to(tl.int64)
    position = tl.cumsum(new.to(tl.int32), 0) - 1
    bits = tl.cumsum(tl.where(valid & (again == 0), 1 << (key % BQ), 0), 0)
    tl.store(UNION + at * ROOM + position, block, mask=new)
    tl.store(BITS + at * ROOM + position, bits, mask=last)
    behind = new & (block < (n_k - n_q + first + 1) // S)
    tl.store(SIZES + 2 * at, tl.sum(new.to(tl.int32), 0))
    tl.store(SIZES + 2 * at + 1, tl.sum(behind.to(tl.int32), 0))


@_jit
def _selected_kernel(
    Q, K, V, OUT, LSE, UNION_, BITS, SIZES, GATES, KEPT, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, UNION: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr,
    EACH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Attention of a tile over the union of its blocks: rows are its queries times the heads of a KV head, and a row
    takes part in the blocks that its query chose.

    Turns are pipelined by hand: logits are computed a turn before their softmax, so that matrix products run beside
    exponentials, and where keys stand is known a turn before they are loaded. The compiler would load a block's index
    and its keys in the same turn, and by waiting for the index wait for all keys under way.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(tile, CU_Q, CU_K, B, BQ, 0, S, B_P2)
    if first < n_q:
        m, row, at_q = _head_rows(first, q0, n_q, g, H, G, BQ, EACH, ROWS)
        i = n_k - n_q + m
        q = _load(Q, at_q * D, row, D, D_P2, True)
        acc = tl.zeros((ROWS, D_P2), tl.float32)
        top = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        j = tl.arange(0, BN)
        at = (g * tl.num_programs(0) + tile).to(tl.int64)
        size = tl.load(SIZES + 2 * at)
        behind = tl.load(SIZES + 2 * at + 1)
        at = at * UNION
        PARTS: tl.constexpr = S // BN
        key, on = _entry(UNION_, BITS, at, 0, size, m - first, S, PARTS)
        next_key, _ = _entry(UNION_, BITS, at, 1, size, m - first, S, PARTS)
        x = _logits(q, K, k0, key + j, n_k, g, G, D, D_P2, PRECISION)
        # Two loops rather than one with a mask; the second is a loop, too, because two dots of straight-line code
        # after a pipelined loop make ptxas serialise every wgmma of the kernel.
        for part in range(behind * PARTS):
            next_x = _logits(q, K, k0, next_key + j, n_k, g, G, D, D_P2, PRECISION)
            v = _load(V, ((k0 + key + j).to(tl.int64) * G + g) * D, row, D, D_P2, False)
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, on, PRECISION)
            x = next_x
            key, on = _entry(UNION_, BITS, at, part + 1, size, m - first, S, PARTS)
            next_key, _ = _entry(UNION_, BITS, at, part + 2, size, m - first, S, PARTS)
        for part in range(behind * PARTS, size * PARTS):
            next_x = _logits(q, K, k0, next_key + j, n_k, g, G, D, D_P2, PRECISION)
            v = _load(V, ((k0 + key + j).to(tl.int64) * G + g) * D, key + j < n_k, D, D_P2, True)
            x = tl.where((key + j)[None, :] <= i[:, None], x, float("-inf"))
            acc, top, total = _softmax_step(acc, top, total, x, v, scale, on, PRECISION)
            x = next_x
            key, on = _entry(UNION_, BITS, at, part + 1, size, m - first, S, PARTS)
            next_key, _ = _entry(UNION_, BITS, at, part + 2, size, m - first, S, PARTS)
        o, lse = _finish(acc, top, total)
        tl.store(LSE + at_q, lse, mask=row)
        _store_share(OUT, KEPT, GATES, at_q, row, o, D, D_P2, GATED, BRANCH, KEEP)


@_jit
def _store_share(
    OUT, KEPT, GATES, at, row, o,
    D: tl.constexpr, D_P2: tl.constexpr, GATED: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store o [R, D] at the rows `at` of [N, H]; GATED: a branch's share of the gated sum, added to those of lower
    number, and with KEEP o itself to KEPT."""
    if KEEP:
        _store(KEPT, at * D, row, o, D, D_P2)
    if GATED:
        o *= tl.load(GATES + at * 3 + BRANCH, mask=row, other=0.0).to(tl.float32)[:, None]
        if BRANCH > 0:
            o += _load(OUT, at * D, row, D, D_P2, True).to(tl.float32)
    _store(OUT, at * D, row, o, D, D_P2)


@_jit
def _head_rows(
    first, q0, n_q, g,
    H: tl.constexpr, G: tl.constexpr, BQ: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of a tile of BQ queries times EACH heads of a KV head, padded to ROWS: query, whether there is one, and its
    place in [N, H]."""
    r = tl.arange(0, ROWS)
    m = first + tl.minimum(r // EACH, BQ - 1)
    head = r % EACH
    row = (r < BQ * EACH) & (m < n_q) & (head < H // G)
    return m, row, (q0 + m).to(tl.int64) * H + g * (H // G) + head


@_jit
def _entry(UNION_, BITS, at, part, size, query, S: tl.constexpr, PARTS: tl.constexpr):
    """First key of a part of a tile's union of `size` blocks, and which rows, of the queries `query` of the tile, chose
    its block. Beyond the end: key 0, and no row."""
    entry = at + part // PARTS
    there = part < size * PARTS
    bits = tl.load(BITS + entry, mask=there, other=0) - tl.load(BITS + entry - 1, mask=there & (part >= PARTS), other=0)
    block = tl.load(UNION_ + entry, mask=there, other=0)
    return block * S + part % PARTS * (S // PARTS), ((bits >> query) & 1) != 0


@_jit
def _logits(
    q, K, k0, key, n_k, g, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Products of q [R, D] with the keys `key` [n] of a sample."""
    k = _load(K, ((k0 + key).to(tl.int64) * G + g) * D, key < n_k, D, D_P2, True)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@_jit
def _dots_kernel(
    D_OUT, OUTPUTS, DOTS, rows,
    D: tl.constexpr, D_P2: tl.constexpr, BRANCHES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DOTS [rows, BRANCHES]: d_out · o of each branch; OUTPUTS [BRANCHES, rows, D]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = r.to(tl.int64)
    do = _load(D_OUT, at * D, r < rows, D, D_P2, True).to(tl.float32)
    for branch in tl.static_range(BRANCHES):
        o = _load(OUTPUTS, (at + branch * tl.cast(rows, tl.int64)) * D, r < rows, D, D_P2, True).to(tl.float32)
        tl.store(DOTS + at * BRANCHES + branch, tl.sum(do * o, 1), mask=r < rows)


@_jit
def _gradient_rows(
    Q, D_OUT, LSE, GATES, DOTS, at, row,
    D: tl.constexpr, D_P2: tl.constexpr, GATED: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Of rows of [N, H]: q, d_out, lse in units of log 2 (infinite where there is no row or key, so that
    probabilities are 0), gate, and d_out · o. The gradient of logits is gate * p * (d_out · v - d_out · o)."""
    q = _load(Q, at * D, row, D, D_P2, True)
    do = _load(D_OUT, at * D, row, D, D_P2, True)
    lse = tl.load(LSE + at, mask=row, other=float("-inf")) * 1.4426950408889634
    gate = row.to(tl.float32)
    if GATED:
        gate = tl.load(GATES + at * BRANCHES + BRANCH, mask=row, other=0.0).to(tl.float32)
    dot = tl.load(DOTS + at * BRANCHES + BRANCH, mask=row, other=0.0)
    return q, do, tl.where(lse > float("-inf"), lse, float("inf")), gate, dot


@_jit
def _dq_step(acc, q, do, k, v, keep, scale, lse, dot, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Add to acc [R, D] the gradient of q through a tile of keys k, v [n, D], before gate and scale."""
    p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASK:
        p = tl.where(keep, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - dot[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@_jit
def _dkv_step(dk, dv, q, do, k, v, keep, scale, lse, gate, dot, PRECISION: tl.constexpr):
    """Add to dk, dv [n, D] the gradients of keys through rows q, do [R, D], before the scale; keep [n, R]."""
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]) * gate[None, :]
    p = tl.where(keep, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - dot[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@_jit
def _store_dq(DQ, at, row, dq, gate, scale, D: tl.constexpr, D_P2: tl.constexpr, ADD: tl.constexpr):
    dq *= (gate * (scale * 0.6931471805599453))[:, None]
    if ADD:
        dq += _load(DQ, at, row, D, D_P2, True).to(tl.float32)
    _store(DQ, at, row, dq, D, D_P2)


@_jit
def _band_dq_kernel(
    Q, K, V, DQ, D_OUT, LSE, GATES, DOTS, window, SEEN, SKIP, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
    WORDS: tl.constexpr, GATED: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradient of one head of a tile's queries through `_band_kernel`: DQ [N, H, D]."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    first, q0, k0, key0, n_q, n_k = _place(tile, CU_Q, CU_K, B, BM, 0, S, B_P2)
    if first < n_q:
        g = h // (H // G)
        m = first + tl.arange(0, BM)
        row = m < n_q
        seen = _seen(SEEN, q0, m, n_q, n_k, S)
        at = _row(q0, m, n_q, REVERSE) * H + h
        q, do, lse, gate, dot = _gradient_rows(Q, D_OUT, LSE, GATES, DOTS, at, row, D, D_P2, GATED, BRANCHES, BRANCH)
        acc = tl.zeros((BM, D_P2), tl.float32)
        j = tl.arange(0, BN)
        by_first = _seen(SEEN, q0, first, n_q, n_k, S)
        by_last = _seen(SEEN, q0, tl.minimum(first + BM, n_q) - 1, n_q, n_k, S)
        low = tl.maximum(by_first - window, 0)
        for start in range(low, by_last, BN):
            where = (_row(key0, start + j, n_k // S, REVERSE) * G + g) * D
            there = start + j < by_last
            k = _load(K, where, there, D, D_P2, True)
            v = _load(V, where, there, D, D_P2, True)
            key = (start + j)[None, :]
            keep = (key < seen[:, None]) & (key >= (seen - window)[:, None])
            if SKIP is not None:
                keep = keep & ~_is_skipped(SKIP, ((q0 + m).to(tl.int64) * G + g)[:, None], row[:, None], key, WORDS)
            acc = _dq_step(acc, q, do, k, v, keep, scale, lse, dot, True, PRECISION)
        _store_dq(DQ, at * D, row, acc, gate, scale, D, D_P2, ADD)


@_jit
def _selected_dq_kernel(
    Q, K, V, DQ, D_OUT, LSE, GATES, DOTS, UNION_, BITS, SIZES, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, UNION: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr,
    EACH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, BRANCHES: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's queries through `_selected_kernel`: DQ [N, H, D]."""
    tile = tl.program_id(0)
    g = tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(tile, CU_Q, CU_K, B, BQ, 0, S, B_P2)
    if first < n_q:
        m, row, at_q = _head_rows(first, q0, n_q, g, H, G, BQ, EACH, ROWS)
        i = n_k - n_q + m
        q, do, lse, gate, dot = _gradient_rows(Q, D_OUT, LSE, GATES, DOTS, at_q, row, D, D_P2, GATED, BRANCHES, BRANCH)
        acc = tl.zeros((ROWS, D_P2), tl.float32)
        j = tl.arange(0, BN)
        at = (g * tl.num_programs(0) + tile).to(tl.int64)
        size = tl.load(SIZES + 2 * at)
        behind = tl.load(SIZES + 2 * at + 1)
        at = at * UNION
        PARTS: tl.constexpr = S // BN
        key, on = _entry(UNION_, BITS, at, 0, size, m - first, S, PARTS)  # a turn ahead, as in the forward pass
        for part in range(behind * PARTS):
            where = ((k0 + key + j).to(tl.int64) * G + g) * D
            k = _load(K, where, row, D, D_P2, False)
            v = _load(V, where, row, D, D_P2, False)
            acc = _dq_step(acc, q, do, k, v, on, scale, tl.where(on, lse, float("inf")), dot, False, PRECISION)
            key, on = _entry(UNION_, BITS, at, part + 1, size, m - first, S, PARTS)
        for part in range(behind * PARTS, size * PARTS):
            where = ((k0 + key + j).to(tl.int64) * G + g) * D
            k = _load(K, where, key + j < n_k, D, D_P2, True)
            v = _load(V, where, key + j < n_k, D, D_P2, True)
            keep = (key + j)[None, :] <= i[:, None]
            acc = _dq_step(acc, q, do, k, v, keep, scale, tl.where(on, lse, float("inf")), dot, True, PRECISION)
            key, on = _entry(UNION_, BITS, at, part + 1, size, m - first, S, PARTS)
        _store_dq(DQ, at_q * D, row, acc, gate, scale, D, D_P2, ADD)


@_jit
def _band_dkv_kernel(
    Q, K, V, DK, DV, D_OUT, LSE, GATES, DOTS, window, n_keys, SEEN, SKIP, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    GATED: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of `_band_kernel` through a split of the queries that see them: DK, DV fp32 [splits, n_keys,
    G, D]."""
    g = tl.program_id(1)
    split = tl.program_id(2)
    first, q0, k0, key0, n_q, n_k = _place(tl.program_id(0), CU_Q, CU_K, B, BN, S, S, B_P2)
    if first < n_k // S:
        j = first + tl.arange(0, BN)
        there = j < n_k // S
        where = (_row(key0, j, n_k // S, REVERSE) * G + g) * D
        k = _load(K, where, there, D, D_P2, True)
        v = _load(V, where, there, D, D_P2, True)
        dk = tl.zeros((BN, D_P2), tl.float32)
        dv = tl.zeros((BN, D_P2), tl.float32)
        before = n_k - n_q
        low = tl.maximum((first + 1) * S - 1 - before, 0)  # the first query that sees one of the keys
        high = tl.minimum((first + BN + window) * S - 1 - before, n_q)
        if SEEN is not None:
            low, high = 0 * n_q, n_q
        step = tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(2) * BM) * BM
        low += split * step
        high = tl.minimum(high, low + step)
        # From a tile's first row, so that what differs between rows stays the same from turn to turn.
        r = tl.arange(0, BM)
        way = -r if REVERSE else r
        start, h = low, g * (H // G)
        for _ in range(tl.cdiv(tl.maximum(high - low, 0), BM) * (H // G)):  # head by head
            m = start + r
            row = m < high
            at = _row(q0, start, n_q, REVERSE) * H + h
            q, do, lse, gate, dot = _gradient_rows(
                Q + at * D, D_OUT + at * D, LSE + at, GATES + at * BRANCHES, DOTS + at * BRANCHES,
                way * H, row, D, D_P2, GATED, BRANCHES, BRANCH,
            )  # fmt: skip
            seen = _seen(SEEN, q0, m, n_q, n_k, S)[None, :]
            keep = (j[:, None] < seen) & (j[:, None] >= seen - window)
            if SKIP is not None:
                skip_at = ((q0 + m).to(tl.int64) * G + g)[None, :]
                keep = keep & ~_is_skipped(SKIP, skip_at, row[None, :], j[:, None], WORDS)
            dk, dv = _dkv_step(dk, dv, q, do, k, v, keep, scale, lse, gate, dot, PRECISION)
            start += BM
            h = tl.where(start < high, h, h + 1)
            start = tl.where(start < high, start, low)
        where += split * (tl.cast(n_keys, tl.int64) * (G * D))
        _store(DK, where, there, dk * (scale * 0.6931471805599453), D, D_P2)
        _store(DV, where, there, dv, D, D_P2)


@_jit
def _selected_dkv_kernel(
    Q, K, V, DK, DV, D_OUT, LSE, GATES, DOTS, QUERIES, LIST_OF, START_OF, OFFSETS, g0, pieces, CU_Q, CU_K, B, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr,
    PRECISION: tl.constexpr, LIST: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr,
    EACH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, BRANCHES: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of a block through a piece of the list of queries that chose it: DK, DV fp32 [pieces, S, D].
    Lists are those of `_Call.lists`, `pieces` of them per KV head from g0 on."""
    piece = tl.program_id(0)
    list_ = tl.load(LIST_OF + piece)
    if list_ >= 0:
        g = g0 + list_ // pieces
        first, q0, k0, block0, n_q, n_k = _place(list_ % pieces, CU_Q, CU_K, B, S, 1, S, B_P2)
        start = tl.load(START_OF + piece)
        stop = tl.minimum(tl.load(OFFSETS + list_ + 1), start + LIST)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        there = first + n < n_k
        where = ((k0 + first + n).to(tl.int64) * G + g) * D
        k = _load(K, where, there, D, D_P2, True)
        v = _load(V, where, there, D, D_P2, True)
        dk = tl.zeros((BN, D_P2), tl.float32)
        dv = tl.zeros((BN, D_P2), tl.float32)
        r = tl.arange(0, ROWS)
        head = r % EACH
        is_head = (r < BQ * EACH) & (head < H // G)
        token = tl.load(QUERIES + start + r // EACH, mask=start + r // EACH < stop, other=-1)
        for at in range(start, stop, BQ):
            row = (token >= 0) & is_head
            at_q = token.to(tl.int64) * H + g * (H // G) + head
            q, do, lse, gate, dot = _gradient_rows(
                Q, D_OUT, LSE, GATES, DOTS, at_q, row, D, D_P2, GATED, BRANCHES, BRANCH
            )
            i = token - q0 + n_k - n_q
            keep = (first + n)[:, None] <= i[None, :]
            dk, dv = _dkv_step(dk, dv, q, do, k, v, keep, scale, lse, gate, dot, PRECISION)
            after = at + BQ + r // EACH  # a turn ahead, as in `_selected_kernel`
            token = tl.load(QUERIES + after, mask=after < stop, other=-1)
        out = (piece.to(tl.int64) * S + n) * D
        _store(DK, out, there, dk * (scale * 0.6931471805599453), D, D_P2)
        _store(DV, out, there, dv, D, D_P2)


@_jit
def _collect_kernel(
    WINDOW_DK, WINDOW_DV, MEANS_DK, MEANS_DV, LIST_DK, LIST_DV, FIRST_PIECE, DK, DV, splits, blocks, g0, CU_Q, CU_K, B,
    G: tl.constexpr, D: tl.constexpr, D_P2: tl.constexpr, B_P2: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    COMPRESSED: tl.constexpr, SELECTED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block: the sum of its partial sums, each branch's in order. MEANS_DK, MEANS_DV [splits, blocks, G,
    D] are the gradients of its means."""
    piece = tl.program_id(0)
    g = g0 + tl.program_id(1)
    first, q0, k0, block0, n_q, n_k = _place(piece, CU_Q, CU_K, B, S, 1, S, B_P2)
    if first < n_k:
        n = tl.program_id(2) * BN + tl.arange(0, BN)
        there = first + n < n_k
        where = ((k0 + first + n).to(tl.int64) * G + g) * D
        block = ((block0 + first // S).to(tl.int64) * G + g) * D
        list_ = tl.program_id(1) * tl.num_programs(0) + piece
        for which in tl.static_range(2):
            total = tl.zeros((BN, D_P2), tl.float32)
            if WINDOW:
                total += _load(WINDOW_DV if which else WINDOW_DK, where, there, D, D_P2, True)
            if SELECTED:
                for p in range(tl.load(FIRST_PIECE + list_), tl.load(FIRST_PIECE + list_ + 1)):
                    at = (tl.cast(p, tl.int64) * S + n) * D
                    total += _load(LIST_DV if which else LIST_DK, at, there, D, D_P2, True)
            if COMPRESSED:  # noqa: SIM102 (decided when compiling)
                if first + S <= n_k:
                    mean = tl.zeros((D_P2,), tl.float32)
                    d = tl.arange(0, D_P2)
                    for split in range(splits):
                        at = tl.cast(split, tl.int64) * blocks * (G * D) + block + d
                        mean += tl.load((MEANS_DV if which else MEANS_DK) + at, mask=d < D, other=0.0)
                    total += mean[None, :] / S
            _store(DV if which else DK, where, there, total, D, D_P2)
