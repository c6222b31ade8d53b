"""Launches of the kernels of `nsa_triton.py`: which compute a branch and its gradients, on what, with what tiles.

Forward; `nsa_kernels.py` has the kernels, and says what tiles, bands and unions are:
  compression  block means, then flash attention of a tile over them                 `means_kernel`, `band_kernel`
  choice       importance of the blocks for a chunk of tiles; the top ones     `importance_kernel`, `top_kernel`
               if by means and variances, first what it is a share of                        `estimate_kernel`
  selection    the union of a tile's blocks; flash attention over it              `union_kernel`, `selected_kernel`
               if `chooses_all`, flash attention of a tile over all keys                           `band_kernel`
  window       flash attention of a tile over a band of keys                                       `band_kernel`
Each branch adds its gated share to the output.

Backward, from inputs, outputs and log-sum-exps of the branches, and chosen blocks; see `nsa_kernels_backward.py`:
  gates        d_out · o per branch: the gradient of its gate, and what its softmax subtracts      `dots_kernel`
  dq           the forward's tiles again, each branch adding to the last     `band_dq_kernel`, `selected_dq_kernel`
  dk, dv       a run of keys, over the queries that see it                                     `band_dkv_kernel`
               a block, over the list of queries that chose it, cut into pieces            `selected_dkv_kernel`
               all these partial sums added up in order                                         `collect_kernel`
"""

import functools
import math
from dataclasses import dataclass

import torch

from .nsa_kernels import (
    band_kernel,
    estimate_kernel,
    importance_kernel,
    means_kernel,
    selected_kernel,
    top_kernel,
    triton,
    union_kernel,
)
from .nsa_kernels_backward import (
    band_dkv_kernel,
    band_dq_kernel,
    collect_kernel,
    dots_kernel,
    selected_dkv_kernel,
    selected_dq_kernel,
)

BRANCHES = ("compressed", "selected", "window")  # of `nsa_attention`, in the order of its gates
MAX_IMPORTANCE = 2**26  # importance values of a chunk of tiles: 256 MB in fp32
MAX_PARTIAL = 2**26  # partial sums of dk and dv for a chunk of KV heads: 256 MB in fp32, or one head's if they are more
MAX_LIST = 1024  # queries of a piece of a block's list
MIN_PROGRAMS = 1024  # into which dk and dv of a band are split, by queries, while these are enough


@dataclass(frozen=True)
class _Band:
    """The keys of a branch whose queries see a run of keys, and the limits of that run. A key stands for S tokens."""

    k: torch.Tensor
    v: torch.Tensor
    S: int
    window: int  # keys that a query looks back on
    seen: torch.Tensor | None = None  # int32 [N]: keys that a query sees; default: those that end at or before it
    skipped: torch.Tensor | None = None  # int32 [N, G, words]: a bit for each key that it does not see
    reverse: bool = False

    @property
    def arguments(self) -> dict:
        """Of the kernels of bands."""
        words = 0 if self.skipped is None else self.skipped.shape[2]
        limits = {"window": self.window, "SEEN": self.seen, "SKIPPED": self.skipped, "WORDS": words}
        return {"K": self.k, "V": self.v, "S": self.S, "REVERSE": self.reverse, **limits}

    def kernel(self, name: str) -> str:
        """The name of a kernel in the tables of tiles, where one that skips keys stands apart: it needs registers."""
        return name if self.skipped is None else name.replace("band", "remainder")


def chooses_all(n_keys: int, block_size: int, block_count: int) -> bool:
    """Whether the keys of all samples are so few that no query has more blocks than it may choose: then the selection
    is dense causal attention."""
    return n_keys <= block_size * block_count


class Launches:
    """Kernel launches over one set of inputs: q [N, H, D]; k, v [M, G, D]; others as in `nsa_triton._attend`.

    Without blocks, the selection is of all keys up to the query.
    """

    def __init__(
        self, q, k, v, cu_seqlens, cu_seqlens_k, *,
        block_size, scale, window_size=0, reverse=False, blocks=None, seen=None,
    ):  # fmt: skip
        (self.n, self.heads, dim), (self.n_keys, self.groups, _) = q.shape, k.shape
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.cu_seqlens, self.cu_seqlens_k = cu_seqlens.contiguous(), cu_seqlens_k.contiguous()
        self.block_size = block_size
        self.window_size = window_size
        self.reverse = reverse
        self.blocks = None if blocks is None else blocks.contiguous()
        self.seen = None if seen is None else seen.contiguous()
        self.samples = len(cu_seqlens) - 1
        self.common = {
            "CU_Q": self.cu_seqlens,
            "CU_K": self.cu_seqlens_k,
            "B": self.samples,
            "B_P2": triton.next_power_of_2(self.samples),
            "H": self.heads,
            "G": self.groups,
            "D": dim,
            "D_P2": triton.next_power_of_2(dim),
            "scale": (dim**-0.5 if scale is None else scale) * math.log2(math.e),
            # It matters for fp32 inputs alone.
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }

    def launch(self, kernel, grid, **arguments):
        """With those of the `common` arguments that the kernel has."""
        common = {name: x for name, x in self.common.items() if name in kernel.arg_names}
        # Triton is about to turn fusion off by default, which would add a tenth to the instructions of a turn.
        kernel[grid](**common, **arguments, enable_fp_fusion=True)

    def tiles(self, size):
        """How many tiles of `size` queries there are at most; lengths stay on the device. Surplus ones do nothing."""
        return self.n // size + self.samples

    @functools.cached_property
    def all_blocks(self):
        """How many blocks there are at most, incomplete ones included."""
        return self.n_keys // self.block_size + self.samples

    @functools.cached_property
    def means(self):
        """Means of k and v over complete blocks, [blocks, G, D] in their dtype, sample by sample."""
        count = self.n_keys // self.block_size
        k_means, v_means = (x.new_empty(max(1, count), *x.shape[1:]) for x in (self.k, self.v))
        self.pool(self.v, k_means, v_means, variance=False)
        return k_means, v_means

    @functools.cached_property
    def moments(self):
        """Means of k, and the variances of its channels, over complete blocks. The latter, and the squares that they
        are multiplied with, are bf16 for 16-bit inputs: fp16 does not reach as far."""
        count = self.n_keys // self.block_size
        means = self.k.new_empty(max(1, count), *self.k.shape[1:])
        variances = torch.empty_like(means, dtype=torch.float32 if means.dtype == torch.float32 else torch.bfloat16)
        self.pool(self.k, means, variances, variance=True)
        return means, variances

    def pool(self, v, k_means, v_means, variance):
        """Write the means of k to `k_means`, and those of v, or its variances, to `v_means`."""
        self.launch(
            means_kernel,
            (self.all_blocks, self.groups),
            K=self.k,
            V=v,
            K_MEANS=k_means,
            V_MEANS=v_means,
            S=self.block_size,
            VARIANCE=variance,
            num_warps=4,
        )

    def is_by_blocks(self, name):
        """Whether a branch sees blocks of its choice; others see a band."""
        return name == "selected" and self.blocks is not None

    def band(self, name):
        """The keys of a branch that sees a band."""
        if name == "selected":
            return _Band(self.k, self.v, 1, self.n_keys)
        if name == "window":
            return _Band(self.k, self.v, 1, min(self.window_size, self.n_keys))
        if name == "prefix":
            return _Band(self.k, self.v, 1, self.n_keys, seen=self.seen)
        if name == "pooled":
            return _Band(self.k, self.v, self.block_size, len(self.k), reverse=self.reverse)
        k_means, v_means = self.means
        skipped = self.chosen_bits if name == "remainder" else None
        return _Band(k_means, v_means, self.block_size, len(k_means), skipped=skipped)

    @functools.cached_property
    def chosen_bits(self):
        """The chosen blocks as int32 [N, G, words]: a bit for each."""
        words = triton.next_power_of_2((self.n_keys - 1) // self.block_size // 32 + 1)
        there = (self.blocks >= 0).int()
        blocks = self.blocks.clamp(0, 32 * words - 1)
        bits = torch.zeros(self.groups, self.n, words, dtype=torch.int32, device=blocks.device)
        bits.scatter_add_(2, (blocks // 32).long(), there << (blocks % 32))  # a block is chosen once
        return bits.transpose(0, 1).contiguous()

    def attend(self, name, out, lse, gates=None, branch=0, kept=None):
        """Write o [N, H, D] of a branch to `out`, and lse [N, H].

        With gates [N, H, 3], add its share of the gated sum, by the gates of number `branch`, to what branches of lower
        number have written to `out`, and write o to `kept` if that is given.
        """
        results = {"OUT": out, "LSE": lse, "GATES": gates, "BRANCH": branch, "KEPT": kept}
        if self.is_by_blocks(name):
            config = self.selected_config("selected")
            grid = (self.tiles(config["BQ"]), self.groups)
            union = self.union(config["BQ"])
            keys = {"K": self.k, "V": self.v, "S": self.block_size}
            self.launch(selected_kernel, grid, Q=self.q, **keys, **results, **union, **config)
        else:
            band = self.band(name)
            config = _config(band.kernel("band"), self.q)
            grid = (self.tiles(config["BM"]), self.heads)
            self.launch(band_kernel, grid, Q=self.q, **band.arguments, **results, **config)

    def attend_gated(self, gates, out, outputs, lse):
        """Write the choice to `self.blocks`, if there is one, the gated sum of BRANCHES to `out`; outputs and lse, by
        branch."""
        for branch, name in enumerate(BRANCHES):
            if self.is_by_blocks(name):
                self.choose(lse[0], self.blocks)
            self.attend(name, out, lse[branch], gates, branch, outputs[branch])

    def choose(self, lse, blocks, own_importance=None, window_size=None, spread=False):
        """Write the choice into blocks [G, N, count], from the importance of a chunk of tiles at a time."""
        count = blocks.shape[2]
        n_blocks = (self.n_keys - 1) // self.block_size + 1  # of any sample, at most
        everything = chooses_all(self.n_keys, self.block_size, count)
        config = _config("estimate" if spread else "importance", self.q)
        tiles = self.tiles(config["BM"])

        stride = triton.cdiv(n_blocks, 16) * 16  # so that rows are aligned
        size = self.groups * config["BM"] * stride  # of a tile
        step = max(1, MAX_IMPORTANCE // size)
        importance = torch.empty(0 if everything else min(step, tiles) * size, dtype=torch.float32, device=lse.device)

        if not everything:
            means, variances = self.moments if spread else (self.means[0], None)
            scored = {"Q": self.q, "K_MEANS": means, "VARIANCES": variances, "S": self.block_size, **config}
            scored["deviations"] = math.sqrt(2 * math.log(self.block_size))
            if spread:
                lse, others = torch.empty_like(lse), lse
                self.launch(estimate_kernel, (tiles, self.heads), OTHERS=others, LSE=lse, **scored)

        top = {
            "IMPORTANCE": importance,
            "OWN": own_importance,
            "BLOCKS": blocks,
            "n": self.n,
            "window": self.block_size + 1 if window_size is None else window_size,
            "S": self.block_size,
            "COUNT": count,
            "COUNT_P2": triton.next_power_of_2(count),
            "BM": config["BM"],
            "EVERYTHING": everything,
        }
        for start in range(0, tiles, step):
            number = min(step, tiles - start)
            # Where these queries end in their stream at the latest: as if all were of one sample.
            end = self.n_keys - self.n + (start + number) * config["BM"]
            seen = min(triton.cdiv(end, self.block_size), n_blocks)
            chunk = {"tile0": start, "stride": stride}
            if not everything:
                grid = (triton.cdiv(seen, config["BN"]), number, self.groups)
                self.launch(importance_kernel, grid, LSE=lse, IMPORTANCE=importance, **chunk, **scored)
            rows = _top_config(seen)
            grid = (number * config["BM"] // rows["ROWS"], self.groups)
            self.launch(top_kernel, grid, **chunk, **top, **rows)

    def union(self, tile):
        """For tiles of that many queries, arguments by which kernels know their unions."""
        count = self.blocks.shape[2]
        tiles = self.tiles(tile)
        room = tile * count
        union, bits = torch.empty(2, self.groups, tiles, room, dtype=torch.int32, device=self.q.device)
        sizes = torch.empty(self.groups, tiles, 2, dtype=torch.int32, device=self.q.device)
        unions = {"UNION": union, "BITS": bits, "SIZES": sizes, "ROOM": room}
        self.launch(
            union_kernel,
            (tiles, self.groups),
            BLOCKS=self.blocks,
            n=self.n,
            **unions,
            S=self.block_size,
            BQ=tile,
            COUNT=count,
            ROOM_P2=triton.next_power_of_2(room),
            num_warps=4,
        )
        return unions

    def selected_config(self, kernel):
        """Configuration of a kernel whose rows are queries times heads; at most 32 queries, which have a bit each.

        As many queries as fit: 18 of 7 heads fill 126 of 128 rows. In the kernel of dk and dv, which cuts rows into
        few queries at a time, heads are rounded up to a power of 2 instead: there nothing more would fit.
        """
        config = _config(kernel, self.q)
        heads = self.heads // self.groups
        if kernel == "selected_dkv":
            heads = triton.next_power_of_2(heads)
        tile = max(1, min(config.pop("BM") // heads, 32))
        config["BN"] = min(config["BN"], self.block_size)
        return {**config, "BQ": tile, "HEADS": heads, "ROWS": max(16, triton.next_power_of_2(tile * heads))}


class Gradients(Launches):
    """Gradients through one branch, or the gated sum of several."""

    def run(self, branches, d_out, d_lse, gates, outputs, lse, dq, dk, dv, d_gates):
        """Write dq [N, H, D], dk and dv [M, G, D], unless they are empty, and d_gates [N, H, branches]; see
        `nsa_triton._attend_backward`."""
        rows = self.n * self.heads
        results = {"D_OUT": d_out, "OUTPUTS": outputs, "DOTS": d_gates}
        self.launch(dots_kernel, (triton.cdiv(rows, 32),), **results, n_rows=rows, BRANCHES=len(branches), ROWS=32)
        if d_lse is not None:  # the gradient of a logit is p * (d_out · v - d_out · o + d_lse)
            d_gates -= d_lse.unsqueeze(-1)

        self.branches = branches
        common = {
            "D_OUT": d_out,
            "GATES": None if gates is None else gates.contiguous(),
            "DOTS": d_gates,
            "BRANCHES": len(branches),
        }
        self.terms = {name: {**common, "LSE": lse[i], "BRANCH": i} for i, name in enumerate(branches)}
        if dq.numel():
            self.query_gradients(dq)
        if dk.numel():
            self.key_gradients(dk, dv)

    def query_gradients(self, dq):
        """Each branch adds to what those before it have written."""
        for index, name in enumerate(self.branches):
            results = {"DQ": dq, "ADD": index > 0, **self.terms[name]}
            if self.is_by_blocks(name):
                config = self.selected_config("selected_dq")
                grid = (self.tiles(config["BQ"]), self.groups)
                union = self.union(config["BQ"])
                keys = {"K": self.k, "V": self.v, "S": self.block_size}
                self.launch(selected_dq_kernel, grid, Q=self.q, **keys, **results, **union, **config)
            else:
                band = self.band(name)
                config = _config(band.kernel("band_dq"), self.q)
                grid = (self.tiles(config["BM"]), self.heads)
                self.launch(band_dq_kernel, grid, Q=self.q, **band.arguments, **results, **config)

    def key_gradients(self, dk, dv):
        """Partial sums of every branch in fp32, then all of them added up."""
        tokens = means = selected = (None, None)
        for name in self.branches:
            if name in ("pooled", "prefix"):  # those of k and v themselves, of no other branch
                for gradient, partial in zip((dk, dv), self.band_partial(name), strict=True):
                    gradient.copy_(partial.sum(0))
                return
            if name == "window":
                tokens = self.band_partial(name) if tokens[0] is None else tokens.add_(self.band_partial(name))
            elif name != "selected":
                means = self.band_partial(name)
            elif not self.is_by_blocks(name):
                tokens = self.band_partial(name).sum(1, keepdim=True)
        splits, n_means = (0, 0) if means[0] is None else means[0].shape[:2]
        collected = {
            "TOKENS_DK": tokens[0], "TOKENS_DV": tokens[1], "MEANS_DK": means[0], "MEANS_DV": means[1],
            "splits": splits, "n_means": n_means, "DK": dk, "DV": dv, "S": self.block_size,
        }  # fmt: skip

        # The selection's are as large as all lists: some KV heads at a time.
        first_piece = None
        step = self.groups
        has_lists = any(map(self.is_by_blocks, self.branches))
        if has_lists:
            pieces = self.n * self.blocks.shape[2] // MAX_LIST + self.all_blocks  # for a KV head, at most
            step = max(1, MAX_PARTIAL // (2 * pieces * self.block_size * dk.shape[2]))
        rows = min(self.block_size, 64)
        for g in range(0, self.groups, step):
            count = min(step, self.groups - g)
            if has_lists:
                selected, first_piece = self.selected_partial(g, count, count * pieces)
            grid = (self.all_blocks, count, self.block_size // rows)
            lists = {"LIST_DK": selected[0], "LIST_DV": selected[1], "FIRST_PIECE": first_piece, "g0": g}
            self.launch(collect_kernel, grid, **collected, **lists, BN=rows, num_warps=8)
            del selected, lists  # before the next ones are allocated

    def band_partial(self, name):
        """Partial sums fp32 [2, splits of the queries, keys, G, D]."""
        band = self.band(name)
        config = _config(band.kernel("band_dkv"), self.q)
        tiles = triton.cdiv(len(band.k), config["BN"]) + self.samples
        splits = 1
        if name != "window":  # there are few keys, each seen by many queries
            splits = max(1, min(MIN_PROGRAMS // (tiles * self.groups), triton.cdiv(self.n, 4 * config["BM"])))
        dk, dv = partial = torch.empty(2, splits, *band.k.shape, dtype=torch.float32, device=band.k.device)
        results = {"DK": dk, "DV": dv, "n_keys": len(band.k), **self.terms[name]}
        grid = (tiles, self.groups, splits)
        self.launch(band_dkv_kernel, grid, Q=self.q, **band.arguments, **results, **config)
        return partial

    def selected_partial(self, g, count, pieces):
        """Partial sums fp32 [2, pieces, S, D] for `count` KV heads from g on, and the first piece of each list."""
        queries, list_of, start_of, offsets, first_piece = self.lists(self.blocks[g : g + count], pieces)
        size = (2, pieces, self.block_size, self.k.shape[2])
        dk, dv = partial = torch.empty(size, dtype=torch.float32, device=self.k.device)
        config = self.selected_config("selected_dkv")
        self.launch(
            selected_dkv_kernel,
            (pieces, self.block_size // config["BN"]),
            Q=self.q,
            K=self.k,
            V=self.v,
            DK=dk,
            DV=dv,
            QUERIES=queries,
            LIST_OF=list_of,
            START_OF=start_of,
            OFFSETS=offsets,
            g0=g,
            blocks=self.all_blocks,
            S=self.block_size,
            LIST=MAX_LIST,
            **self.terms["selected"],
            **config,
        )
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
        device, total = blocks.device, groups * self.all_blocks
        first, in_sample = self.blocks_of_queries
        there = (blocks >= 0) & (blocks < in_sample[:, None])
        head = torch.arange(groups, device=device)[:, None, None] * self.all_blocks
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


# Rows (queries, or queries times heads) and keys of a tile, by what compiles without spilling at a head dim of 128:
# where a program has 227 KB of shared memory, and where it has 99 KB or an architecture is not known.
HOPPER = {
    "band": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "remainder": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 3},
    "importance": {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
    "estimate": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "selected": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "band_dq": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "remainder_dq": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 3},
    "band_dkv": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3},
    "remainder_dkv": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2},
    "selected_dq": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "selected_dkv": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 3},
}
AMPERE = {
    "band": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "remainder": {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2},
    "importance": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "estimate": {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
    "selected": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "band_dq": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "remainder_dq": {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2},
    "band_dkv": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2},
    "remainder_dkv": {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2},
    "selected_dq": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "selected_dkv": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 1},
}
FP32 = dict.fromkeys(HOPPER, {"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 1})


def _config(kernel: str, q: torch.Tensor) -> dict:
    """Tile sizes and launch options of a kernel for the device and dtype of q; never by sequence length."""
    if q.dtype == torch.float32:
        return dict(FP32[kernel])
    return dict((HOPPER if capability(q.device)[0] in (9, 10) else AMPERE)[kernel])


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _top_config(n_blocks: int) -> dict:
    """A row of importance lives in registers, 64 values per thread; short rows share a warp's program."""
    width = max(triton.next_power_of_2(n_blocks), 16)
    return {"WIDTH": width, "ROWS": min(16, max(1, 1024 // width)), "num_warps": min(16, max(1, width // 2048))}
