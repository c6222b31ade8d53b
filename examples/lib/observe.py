"""What layers of a model attend with, observed, and what follows from it: attention received, sinks, choices of blocks.

`watch` and `watch_dense` run a prompt and hand on what each layer attends with, through the one hook that the model has
(`SparseModel.forward`) and that of transformers for stock attention. The branches are computed again from that by the
model's own functions. Shapes: N vision tokens of L tokens in all, H query heads, G KV heads, m keys of a branch, head
dimension D. `analyze.py` measures with it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from videonsa.nsa_checks import BRANCHES
from videonsa.nsa_torch import block_means
from videonsa.video_moments import branch_functions, observing

from .fields import SIZES

MAX_SCORES = 2**25  # attention scores held at a time
SINK_ATTENTION = 0.1  # of `find_sinks`
BINS = 20  # of positions, from the first token of a stream to the last


@dataclass
class Seen:
    """What a layer attends with: one sample's vision stream, after the rotary."""

    layer: int
    q: torch.Tensor  # [N, H, D]
    k: torch.Tensor  # [N, G, D]
    v: torch.Tensor  # [N, G, D]
    gates: torch.Tensor  # [N, H, branches]
    every_q: torch.Tensor  # [L, H, D], and every_k [L, G, D] of all tokens
    every_k: torch.Tensor
    vision: torch.Tensor  # int64 [N], which of the L tokens are vision
    scale: float
    sizes: dict  # block_size, block_count, window_size
    nsa: object  # the module whose functions the model calls

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, len(self.q)], dtype=torch.int32, device=self.q.device)

    def branches(self, names) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, Callable]]:
        """(name, keys [m, G, D], values, lse [N, H], visible) of each branch; visible(i [C]) is bool [G or 1, C, m]."""
        size, count, window = (self.sizes[name] for name in SIZES)
        common = {"cu_seqlens": self.cu_seqlens, "scale": self.scale}
        position = torch.arange(len(self.q), device=self.q.device)
        if "compression" in names:
            _, lse = self.nsa.compressed_attention(self.q, self.k, self.v, block_size=size, **common)
            means = [block_means(x, size) for x in (self.k, self.v)]
            block = torch.arange(len(means[0]), device=self.q.device)
            yield "compression", *means, lse, lambda i: (block < ((i + 1) // size)[:, None])[None]
        if "selection" in names:
            blocks = self.chosen_blocks()
            _, lse = self.nsa.selected_attention(self.q, self.k, self.v, blocks, block_size=size, **common)
            own = position // size

            def is_chosen(i):
                picked = blocks[:, i].long()
                marks = torch.zeros(*picked.shape[:2], int(own[-1]) + 2, dtype=torch.bool, device=picked.device)
                marks.scatter_(2, picked + 1, True)  # -1, for none, goes to the first column
                return marks[..., 1:][..., own] & (position <= i[:, None])

            yield "selection", self.k, self.v, lse, is_chosen
        if "window" in names:
            _, lse = self.nsa.window_attention(self.q, self.k, self.v, window_size=window, **common)
            yield (
                "window",
                self.k,
                self.v,
                lse,
                lambda i: ((position <= i[:, None]) & (position > i[:, None] - window))[None],
            )

    def chosen_blocks(self) -> torch.Tensor:
        """int32 [G, N, block_count]: see `nsa_torch.select_blocks`."""
        common = {"cu_seqlens": self.cu_seqlens, "scale": self.scale, "block_size": self.sizes["block_size"]}
        _, lse = self.nsa.compressed_attention(self.q, self.k, self.v, **common)
        return self.nsa.select_blocks(self.q, self.k, lse, block_count=self.sizes["block_count"], **common)

    def text_attention(self, count: int) -> torch.Tensor:
        """[count, N]: what the vision tokens receive from the last `count` tokens, the mean over heads."""
        q = self.every_q[-count:].float().unflatten(1, (self.k.shape[1], -1))
        rows = []
        for i, one in enumerate(q):
            keys = self.every_k[: len(self.every_k) - count + 1 + i].float()
            p = (torch.einsum("grd,mgd->grm", one, keys) * self.scale).softmax(-1)
            rows.append(p[..., self.vision].mean((0, 1)))
        return torch.stack(rows)


@contextlib.contextmanager
def configured(model, **fields):
    """Other values of configuration fields, which layers read at each call, for a while."""
    before = {name: getattr(model.config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(model.config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


def only_branches(on, attention, q, k, v, gates, layout) -> torch.Tensor:
    """An observer that switches all branches but those of the indices `on` off."""
    return gates * gates.new_tensor([i in on for i in range(len(BRANCHES))])


@torch.no_grad()
def watch(model, inputs: dict, see: Callable[[Seen], None]) -> None:
    """Run one prompt and call see() for each layer, the first one first."""

    def observe(attention, q, k, v, gates, layout):
        if len(k) != 1 or len(layout.cu_seqlens) != 2:
            raise ValueError("only one prompt at a time can be observed")
        k, v = (x[0].transpose(0, 1) for x in (k, v))  # [L, G, D]
        vision = layout.keys.positions
        sizes = {name: getattr(attention.config, name) for name in SIZES}
        streams = (q[layout.queries], k[vision], v[vision])
        nsa = branch_functions(attention, q)
        see(Seen(attention.layer_idx, *streams, gates, q, k, vision, attention.scaling, sizes, nsa))
        return gates

    with observing(model, observe):
        model(**{name: x.to(model.device) for name, x in inputs.items()}, logits_to_keep=1, use_cache=False)


@torch.no_grad()
def watch_dense(model, inputs: dict, see: Callable) -> None:
    """Run one prompt with stock attention and call see(layer, q [L, H, D], k [L, G, D], v, vision int64 [N], scale)."""
    vision = inputs["mm_token_type_ids"][0].nonzero().squeeze(1).to(model.device)

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        see(module.layer_idx, *(x[0].transpose(0, 1) for x in (query, key, value)), vision, scaling)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register("observed", attend)
    AttentionMaskInterface.register("observed", sdpa_mask)
    config = model.config.text_config
    before, config._attn_implementation = config._attn_implementation, "observed"
    try:
        model(**{name: x.to(model.device) for name, x in inputs.items()}, logits_to_keep=1, use_cache=False)
    finally:
        config._attn_implementation = before


# ----------------------------------------------------------------------------------------------------------------------
# Attention received, and sinks
# ----------------------------------------------------------------------------------------------------------------------


def attention_received(
    q, k, lse, visible, scale: float, weight=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What keys receive from all queries, a chunk of queries at a time.

    Args:
        q, k, lse: [N, H, D], [m, G, D] and [N, H] of a softmax attention.
        visible: visible(i int64 [C]) -> bool [G or 1, C, m], which keys each query sees.
        weight: [N, H] on the probabilities of a query, or None.

    Returns:
        The sums over queries of p [H, m] and of weight · p [H, m], and how many queries see a key [G or 1, m].
    """
    (n, heads, _), groups = q.shape, k.shape[1]
    k, rows = k.float(), max(1, MAX_SCORES // max(1, heads * len(k)))
    received = weighted = torch.zeros(groups, heads // groups, len(k), device=q.device)
    seen = torch.zeros(1, len(k), dtype=torch.long, device=q.device)
    for i in torch.arange(n, device=q.device).split(rows):
        mask = visible(i)
        folded = q[i].float().unflatten(1, (groups, -1))
        log_p = torch.einsum("cgrd,mgd->gcrm", folded, k) * scale
        log_p -= lse[i].float().nan_to_num(neginf=0).unflatten(1, (groups, -1)).transpose(0, 1)[..., None]
        p = log_p.exp().masked_fill(~mask[:, :, None], 0)
        received = received + p.sum(1)
        if weight is not None:
            weighted = weighted + torch.einsum("gcrm,cgr->grm", p, weight[i].float().unflatten(1, (groups, -1)))
        seen = seen + mask.sum(1)
    return received.flatten(0, 1), weighted.flatten(0, 1), seen


def received_by_branch(seen: Seen, names) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, α [H, m], key norms [G, m], value norms [G, m]) of each branch and, if named, of the gated mixture."""
    n, heads, _ = seen.q.shape
    size = seen.sizes["block_size"]
    sees_keys = torch.ones(n, 1, len(BRANCHES), device=seen.q.device)
    sees_keys[: size - 1, :, BRANCHES.index("compression")] = 0  # no block is complete
    g = seen.gates.float() * sees_keys
    share = g / g.sum(-1, keepdim=True)  # [N, H, branches]
    mixture = torch.zeros(heads, n, device=seen.q.device)
    for name, k, v, lse, visible in seen.branches(BRANCHES if "gated" in names else names):
        weight = share[..., BRANCHES.index(name)]
        received, weighted, viewers = attention_received(seen.q, k, lse, visible, seen.scale, weight)
        if name in names:
            yield name, per_viewer(received, viewers, heads), norms(k), norms(v)
        if name == "compression":
            weighted = weighted.repeat_interleave(size, 1) / size
        mixture[:, : weighted.shape[1]] += weighted
    if "gated" in names:
        yield "gated", mixture / torch.arange(n, 0, -1, device=mixture.device), norms(seen.k), norms(seen.v)


def dense_received(model, layer, q, k, v, vision, scale):
    """The same of dense causal attention over all tokens, from vision queries to vision keys, after the layer."""
    nsa = branch_functions(model.model.language_model.layers[0].self_attn, q)
    cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    _, lse = nsa.window_attention(q, k, v, cu_seqlens, window_size=len(q), scale=scale)
    position = torch.arange(len(vision), device=q.device)
    received, _, viewers = attention_received(
        q[vision], k[vision], lse[vision], lambda i: (position <= i[:, None])[None], scale
    )
    return layer, per_viewer(received, viewers, q.shape[1]), norms(k[vision]), norms(v[vision])


def per_viewer(received: torch.Tensor, viewers: torch.Tensor, heads: int) -> torch.Tensor:
    return received / viewers.clamp(min=1).repeat_interleave(heads // len(viewers), 0)


def norms(x: torch.Tensor) -> torch.Tensor:
    """[m, G, D] -> [G, m]"""
    return x.float().norm(dim=-1).T


def find_sinks(alpha: torch.Tensor, value_norm: torch.Tensor) -> torch.Tensor:
    """bool [H, m]: 1[α > 0.1 and ‖v‖ < median(‖v‖) - 2·IQR(‖v‖)] for α [H, m] and ‖v‖ [G, m]."""
    low, middle, high = torch.quantile(value_norm, torch.tensor([0.25, 0.5, 0.75], device=alpha.device), dim=1)
    small = value_norm < (middle - 2 * (high - low))[:, None]
    return (alpha > SINK_ATTENTION) & small.repeat_interleave(len(alpha) // len(small), 0)


class SinkTally:
    """Adds sinks up over layers and clips."""

    def __init__(self, layers: int, points: int = 150):
        self.counts = torch.zeros(layers, 3)  # sinks, keys of α > 0.1, keys
        self.positions = torch.zeros(3, BINS)  # the same by position
        self.points, self.kept = points, [[] for _ in range(layers)]

    def add(self, layer: int, alpha: torch.Tensor, key_norm: torch.Tensor, value_norm: torch.Tensor) -> None:
        """Of a layer of a clip: α [H, m], norms [G, m]."""
        heads, m = alpha.shape
        if m < 4:
            return  # no quartiles
        kinds = torch.stack([find_sinks(alpha, value_norm), alpha > SINK_ATTENTION, alpha >= 0]).cpu()  # [3, H, m]
        self.counts[layer] += kinds.sum((1, 2))
        bins = torch.arange(m) * BINS // m
        self.positions.index_add_(1, bins, kinds.sum(1).float())
        if not self.kept[layer]:  # points of the first clip
            mean_alpha = alpha.unflatten(0, (len(key_norm), -1)).mean(1)
            any_sink = kinds[0].unflatten(0, (len(key_norm), -1)).any(1)
            order = mean_alpha.flatten().argsort(descending=True)
            most = order[: self.points // 3]  # those that receive the most, and others evenly
            some = order[:: max(1, len(order) // (self.points * 2 // 3))]
            chosen = torch.cat([most, some]).unique().cpu()
            columns = [x.flatten().cpu()[chosen] for x in (key_norm, value_norm, mean_alpha, any_sink.float())]
            self.kept[layer] = [[round(x, 4) for x in row] for row in torch.stack(columns, 1).tolist()]

    def read(self) -> dict:
        shares = self.counts[:, :2] / self.counts[:, 2:].clamp(min=1)
        positions = (self.positions[:2] / self.positions[2].clamp(min=1)).tolist()
        total = self.counts.sum(0)
        return {
            "share": (total[0] / total[2].clamp(min=1)).item(),
            "attention_only": (total[1] / total[2].clamp(min=1)).item(),
            "by_layer": shares[:, 0].tolist(),
            "by_layer_attention_only": shares[:, 1].tolist(),
            "positions": positions[0],
            "positions_attention_only": positions[1],
            "points": self.kept,  # per layer: key norm, value norm, α, whether a sink of any head
        }


def similarity(g: torch.Tensor) -> torch.Tensor:
    """[3, H, H]: cosines between the trajectories over tokens of the gates g [N, H, 3] of heads, each less its mean."""
    g = (g - g.mean(0)).permute(2, 1, 0)  # [3, H, N]
    g = torch.nn.functional.normalize(g, dim=-1)
    return g @ g.transpose(1, 2)
