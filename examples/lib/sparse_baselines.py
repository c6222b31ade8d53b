"""Training-free sparse prefill methods to compare `nsa_variant="merged"` with; small, for measurement only.

Each is written from its paper and acts where the paper says: on the attention of a prompt, for every head, text and
vision alike, with decoding dense. A method says which pairs of queries and keys it computes; all then share one masked
attention, so that they differ in nothing else (and none is fast here). Block sizes and the last queries that estimate
scale with `block_size`, since the papers' 64 to 128 tokens are a whole clip of a tiny model.

    Tri-shape    SCBench, arXiv 2412.10319: first and recent tokens; the last queries see everything
    MInference   arXiv 2407.02490, vertical-slash: columns and diagonals, by the attention of the last queries
    FlexPrefill  arXiv 2502.20766: by head, blocks of pooled queries and keys or vertical-slash, to a cumulative mass
    XAttention   arXiv 2503.16428: blocks by sums over antidiagonals, to a cumulative mass
    VecAttention arXiv 2603.29494: single keys for each group of queries, by their logits with the group's mean
    FastV        arXiv 2403.06764: after layer 2, vision tokens that the last token attends to least are dropped

A method has one parameter, `level` in 0 ... 1, that its share of computed pairs rises with.
"""

import math

import torch
from transformers import AttentionInterface

NAME = "videonsa_sparse_baseline"


def causal(n: int, device=None) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def expand(blocks: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """bool [..., query blocks, key blocks] -> [..., n, n]"""
    return blocks.repeat_interleave(size, -2)[..., :n, :].repeat_interleave(size, -1)[..., :n]


def most(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool like scores [..., n]: the `count` largest of each row."""
    count = min(count, scores.shape[-1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)


def by_block(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., n] -> [..., blocks]: sums over blocks of the last dimension. The last block may be shorter."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def pooled(x: torch.Tensor, size: int) -> torch.Tensor:
    """[heads, n, dim] -> [heads, blocks, dim]: means over blocks of tokens."""
    return (by_block(x.mT, size) / by_block(x.new_ones(x.shape[1]), size)).mT


def until_mass(p: torch.Tensor, mass: float) -> torch.Tensor:
    """bool like p [..., n]: the fewest, largest first, that hold `mass` of each row's sum."""
    p, order = (p / p.sum(-1, keepdim=True).clamp_min(1e-30)).sort(dim=-1, descending=True)
    kept = p.cumsum(-1) - p < mass
    return torch.zeros_like(kept).scatter_(-1, order, kept)


class Method:
    """Which pairs a layer computes: `__call__(layer, q, k, scale)` -> bool [heads or 1, n, n], for q, k [heads, n, dim]
    of the whole prompt. `keys(layer)`: bool [keys of the prompt] that later tokens may read, or None for all."""

    def __init__(self, level: float, vision: torch.Tensor, block_size: int):
        self.level, self.vision, self.size = level, vision, block_size

    def keys(self, layer: int) -> torch.Tensor | None:
        return None


class TriShape(Method):
    """A first block, a band of the most recent tokens, and all keys for the last block of queries."""

    def __call__(self, layer, q, k, scale):
        n = q.shape[1]
        i = torch.arange(n)
        recent = i[:, None] - i < max(self.size, round(self.level * n))
        return ((recent | (i < self.size) | (i[:, None] >= n - self.size)) & causal(n))[None]


def last_attention(q, k, scale, count):
    """Attention probabilities [heads, count, n] of the last `count` queries."""
    n = q.shape[1]
    scores = q[:, -count:] @ k.mT * scale
    return scores.masked_fill(~causal(n)[-count:], -torch.inf).softmax(-1)


def lines(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of p [heads, last queries, n] over columns, and over diagonals by the distance from query to key."""
    count, n = p.shape[1:]
    distance = torch.arange(n - count, n)[:, None] - torch.arange(n)
    slash = p.new_zeros(len(p), n).index_add_(1, distance.clamp_min(0).flatten(), p.flatten(1))  # p is 0 ahead
    return p.sum(1), slash


def draw(vertical: torch.Tensor, slash: torch.Tensor) -> torch.Tensor:
    """bool [heads, n, n] of chosen columns and diagonals, both bool [heads, n]."""
    n = vertical.shape[1]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp_min(0)
    return (vertical[:, None] | slash[:, distance]) & causal(n)


class MInference(Method):
    """Vertical-slash: a fixed number of columns and diagonals per head; the first tokens and the most recent ones are
    always among them."""

    def __call__(self, layer, q, k, scale):
        n = q.shape[1]
        vertical, slash = lines(last_attention(q, k, scale, min(n, self.size)))
        vertical[:, : self.size // 2] = torch.inf
        slash[:, : self.size] = torch.inf
        count = max(self.size, round(self.level * n))
        return draw(most(vertical, count), most(slash, count))


class FlexPrefill(Method):
    """A head whose pooled attention tells its true attention (Jensen–Shannon distance below 0.1, for the last queries)
    takes blocks by the pooled attention, others columns and diagonals; both to a cumulative mass of `level`."""

    def __call__(self, layer, q, k, scale):
        n, size = q.shape[1], self.size
        p = last_attention(q, k, scale, min(n, size))
        blocks = math.ceil(n / size)
        true = by_block(p.sum(1), size) / p.shape[1]
        pooled_k = pooled(k, size)
        scores = pooled(q, size) @ pooled_k.mT * scale
        scores = scores.masked_fill(~causal(blocks), -torch.inf).softmax(-1)
        estimate = (q[:, -size:].mean(1, keepdim=True) @ pooled_k.mT * scale).softmax(-1)[:, 0]
        middle = (true + estimate) / 2
        divergence = [(x * (x.clamp_min(1e-12) / middle.clamp_min(1e-12)).log()).sum(-1) for x in (true, estimate)]
        query_aware = (sum(divergence) / 2).clamp_min(0).sqrt() < 0.1
        total = scores / blocks  # rows of the map are averages; one mass for the whole of it
        chosen = until_mass(total.flatten(1), self.level).view_as(total)
        i = torch.arange(blocks)
        chosen |= (i == 0) | (i[:, None] == i)
        vertical, slash = (until_mass(x, self.level) for x in lines(p))
        vertical[:, :size] = slash[:, :size] = True
        return torch.where(query_aware[:, None, None], expand(chosen, n, size), draw(vertical, slash)) & causal(n)


class XAttention(Method):
    """Blocks of queries and keys scored by antidiagonals: every `stride`-th query is summed with the keys that cross it
    to a row of the softmax; a row of blocks takes the fewest that hold the mass `level`, the first and its own."""

    def __call__(self, layer, q, k, scale, stride=4):
        heads, n, dim = q.shape
        blocks = math.ceil(n / self.size)
        q, k = (torch.nn.functional.pad(x, (0, 0, 0, blocks * self.size - n)) for x in (q, k))
        q = q.unflatten(1, (-1, stride)).flatten(2)  # groups of `stride` tokens
        k = k.unflatten(1, (-1, stride)).flip(2).flatten(2)  # against the order: products run along antidiagonals
        scores = (q @ k.mT) * (scale / stride)
        p = scores.masked_fill(~causal(scores.shape[1]), -torch.inf).softmax(-1)
        p[:, math.ceil(n / stride) :] = 0  # of padding
        per = self.size // stride
        p = p.unflatten(2, (blocks, per)).sum(-1).unflatten(1, (blocks, per)).sum(2)  # [heads, blocks, blocks]
        i = torch.arange(blocks)
        chosen = until_mass(p, self.level) | (i == 0) | (i[:, None] == i)
        return expand(chosen, n, self.size) & causal(n)


class VecAttention(Method):
    """Neighbouring queries share single keys: those whose logit with the mean of the queries is at most a gap below the
    largest of the row; the first block and their own are always among them. All heads have one gap, as the paper's
    vision-language models do. The largest is exact here; the paper's kernel finds it tile by tile."""

    def __call__(self, layer, q, k, scale):
        n, size = q.shape[1], self.size
        scores = pooled(q, size) @ k.mT * scale  # [heads, groups of queries, n]
        own, key = torch.arange(scores.shape[1])[:, None] * size, torch.arange(n)
        scores = scores.masked_fill(key >= own + size, -torch.inf)
        gap = self.level / max(1 - self.level, 1e-6)  # from 0, the largest alone, to all keys
        chosen = (scores >= scores.amax(-1, keepdim=True) - gap) | (key < size) | (key >= own)
        return chosen.repeat_interleave(size, 1)[:, :n] & causal(n)


class FastV(Method):
    """Layers from the third on see the text and the `level` of the vision tokens that the last token attends to most
    in the second layer, averaged over heads."""

    kept = None

    def __call__(self, layer, q, k, scale):
        n = q.shape[1]
        if layer == 1:
            received = last_attention(q, k, scale, 1)[:, 0].mean(0).masked_fill(~self.vision, -1)
            self.kept = ~self.vision | most(received, round(self.level * int(self.vision.sum())))
        keep = causal(n)
        if layer > 1:  # a token that is dropped computes nothing; its own key keeps its softmax finite
            keep = keep & (self.kept & self.kept[:, None] | torch.eye(n, dtype=torch.bool))
        return keep[None]

    def keys(self, layer):
        return self.kept if layer > 1 else None


METHODS = {
    "Tri-shape": TriShape,
    "MInference": MInference,
    "FlexPrefill": FlexPrefill,
    "XAttention": XAttention,
    "VecAttention": VecAttention,
    "FastV": FastV,
}


class Prefill:
    """Runs a model of variant "dense" with a method: `with Prefill(model, method): model.generate(...)`, one prompt
    without padding. `shares` then has the share of the causal pairs that each layer computed."""

    def __init__(self, model, method: Method):
        self.text_config, self.method, self.shares = model.model.language_model.config, method, []

    def __enter__(self):
        self.before = self.text_config._attn_implementation
        AttentionInterface.register(NAME, self.attend)
        self.text_config._attn_implementation = NAME
        return self

    def __exit__(self, *_):
        self.text_config._attn_implementation = self.before

    def attend(self, module, q, k, v, attention_mask, scaling, **kwargs):
        """q [1, heads, new, dim]; k, v [1, groups, all, dim] -> [1, new, heads, dim]"""
        k, v = (x[0].repeat_interleave(module.num_key_value_groups, 0) for x in (k, v))
        new, total, layer = q.shape[2], k.shape[1], module.layer_idx
        if new == total:
            keep = self.method(layer, q[0], k, scaling)
            self.shares.append(float(keep.float().mean(0).sum() / (total * (total + 1) / 2)))
        else:
            read = self.method.keys(layer)
            read = torch.ones(total, dtype=torch.bool) if read is None else read
            keep = torch.nn.functional.pad(read, (0, total - len(read)), value=True).expand(1, new, -1)
            keep = keep & causal(total)[-new:]
        scores = (q[0] @ k.mT * scaling).masked_fill(~keep, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1)[None], None
