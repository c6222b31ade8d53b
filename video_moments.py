"""The moments of videos that a model looked at, while it answers with `generate`.

`AnswerAttention` sees what the tokens of an answer attend to, in every variant. `ChoiceCounter` counts the blocks that
vision tokens choose, in the variants where they choose. `pick_moments` and `patch_frame` make pictures of either;
`VideoChat` in `video_chat.py` puts them together.
"""

import math
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

MOMENTS = 8  # that are picked at most
LEAST_OF_FIRST = 1 / 4  # of the largest share, for a moment to be picked
ANSWER_LAYERS = 4  # whose attention counts for an answer: more would cost as much again, on a CPU
ANSWER_TOKENS = 64  # of an answer that count at most, evenly spread
CHOICE_LAYERS = 3  # whose choices of blocks are counted
MAX_SCORES = 2**25  # attention scores held at a time


@dataclass
class Moment:
    """A frame as the model saw it.

    Attributes:
        seconds: when it is on screen.
        share: of an answer's attention to videos, the part that its frame and those beside it in a temporal patch
            receive; or, of the vision tokens that had the choice, those that chose to read it.
        frame: uint8 [height, width, 3]; None where nobody asked for pictures.
        video: its number in the conversation, from 0.
    """

    seconds: float
    share: float
    frame: np.ndarray | None = field(default=None, repr=False)
    video: int = 0

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds, 1), 60)
        when = f"{minutes:.0f}:{seconds:04.1f}".removesuffix(".0")
        share = 100 * self.share
        video = f"video {self.video + 1}, " if self.video else ""
        return f"{video}{when} ({share:.{0 if share >= 1 else 1}f} %)"


def spread_layers(model, count: int) -> list[int]:
    """At most `count` layers of a model, evenly spread, the last one among them."""
    layers = model.config.text_config.num_hidden_layers
    return sorted({round((i + 1) * (layers - 1) / count) for i in range(count)} if layers > count else range(layers))


def this_thread() -> Callable[[], bool]:
    """Tells whether it is called in the thread that asked for it: another one may run the same model."""
    thread = threading.get_ident()
    return lambda: threading.get_ident() == thread


# ----------------------------------------------------------------------------------------------------------------------
# What an answer attends to
# ----------------------------------------------------------------------------------------------------------------------


class AnswerAttention:
    """Sees what the tokens of an answer attend to, without changing it.

        with AnswerAttention(model) as attention:
            model.generate(**inputs, past_key_values=cache)
        received = attention.received(cache)

    Only what queries are made of is kept while `generate` runs, for one prompt and a growing cache; keys are in the
    cache, and both meet afterwards. In the variant "released", text has a further term, which is not counted.
    """

    def __init__(self, model):
        self.rotary_emb = model.model.language_model.rotary_emb
        layers = model.model.language_model.layers
        self.watched = [layers[i].self_attn for i in spread_layers(model, ANSWER_LAYERS)]
        self.handles = []

    def __enter__(self) -> "AnswerAttention":
        # Of the last token of each call: of each layer [1, 1, hidden], what queries are made of; (cosines, sines).
        self.states = [[] for _ in self.watched]
        self.rotary = []
        is_own = this_thread()

        def last(x):
            return x if x.shape[-2] == 1 else x[..., -1:, :].clone()  # without a copy, all others would stay

        def keep_rotary(module, args, output):
            if is_own():
                self.rotary.append([last(x) for x in output])

        def keep(kept):
            return lambda module, args: kept.append(last(args[0])) if is_own() else None

        # Before the projections, not after: a layer with an output that somebody reads computes it for all tokens.
        self.handles = [self.rotary_emb.register_forward_hook(keep_rotary)]
        for attention, kept in zip(self.watched, self.states, strict=True):
            self.handles.append(attention.q_proj.register_forward_pre_hook(keep(kept)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def received(self, cache) -> torch.Tensor:
        """What each token in the cache receives, fp32 [tokens] on the CPU: the attention probability, the mean over
        tokens that predict the answer, the watched layers and their heads."""
        total, count = torch.zeros(cache.get_seq_length()), len(self.rotary)
        taken = torch.linspace(0, count - 1, min(count, ANSWER_TOKENS)).round().long()
        # [3, 1, 1, D] in transformers 5.17: text has the same position in all three components.
        cos, sin = (torch.stack([self.rotary[i][x].flatten(0, -2)[:1] for i in taken]).float() for x in (0, 1))
        for attention, kept in zip(self.watched, self.states, strict=True):
            keys = cache.layers[attention.layer_idx].keys[0]  # [G, tokens, D]
            q = attention.q_proj(torch.cat([kept[i][0] for i in taken])).unflatten(1, (-1, keys.shape[-1]))  # [T, H, D]
            q = getattr(attention, "q_norm", nn.Identity())(q).float()  # Qwen3 normalises queries, Qwen2.5 does not
            first, second = q.chunk(2, -1)
            q = q * cos.to(q.device) + torch.cat([-second, first], -1) * sin.to(q.device)
            places = (len(total) - count + taken).to(keys.device)
            total += received(q, keys, places, attention.scaling).cpu()
        return total / len(self.watched)


def received(q: torch.Tensor, keys: torch.Tensor, places: torch.Tensor, scale: float) -> torch.Tensor:
    """What each of keys [G, n, D] receives from queries q [T, H, D], which stand at `places` int64 [T] among them,
    causally: fp32 [n], the mean over queries and heads."""
    (groups, n, _), (count, heads, _) = keys.shape, q.shape
    total = torch.zeros(n, device=keys.device)
    position = torch.arange(n, device=keys.device)
    seen = places.repeat_interleave(heads // groups)[:, None]
    for group, own in zip(keys, q.unflatten(1, (groups, -1)).unbind(1), strict=True):
        group = group.float()
        for part, last in zip(*(x.split(max(1, MAX_SCORES // n)) for x in (own.flatten(0, 1), seen)), strict=True):
            scores = (part @ group.T * scale).masked_fill_(position > last, -torch.inf)
            total += scores.softmax(-1).sum(0)
    return total / (count * heads)


# ----------------------------------------------------------------------------------------------------------------------
# What vision tokens choose
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def observing(model, observe: Callable):
    """Have the layers call `observe` (see `SparseModel.forward`), also where generate() runs the model."""
    is_own = this_thread()

    def add(module, args, kwargs):
        return args, {**kwargs, "observe": observe} if is_own() else kwargs

    handle = model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class ChoiceCounter:
    """An observer that counts which blocks of the stream of vision tokens are chosen, over several calls.

    Counts the variants "paper" and "merged"; in "dense" nothing is chosen, and in "released" it is not counted.
    """

    def __init__(self, model):
        self.watched = spread_layers(model, CHOICE_LAYERS)
        self.counts = torch.zeros(0, 2, dtype=torch.float64)  # [blocks, (chosen, could have been)]

    def __call__(self, attention, q, k, v, gates, layout):
        if attention.layer_idx in self.watched:
            counts = count_chosen(attention, q, k, v, layout)
            if counts is not None:
                before = counts.new_zeros(len(counts), 2)
                before[: len(self.counts)] = self.counts
                self.counts = before + counts
        return gates

    def shares(self, tokens: int, block_size: int) -> torch.Tensor:
        """fp32 [tokens]: how many chose each of the first vision tokens, of those that had the choice; nan if none."""
        shares = (self.counts[:, 0] / self.counts[:, 1]).float().repeat_interleave(block_size)[:tokens]
        return torch.nn.functional.pad(shares, (0, tokens - len(shares)), value=math.nan)


def count_chosen(attention, q, k, v, layout) -> torch.Tensor | None:
    """`count_choices` of what an observer gets of a layer; None where no vision token had to choose."""
    config = attention.config
    size, count, merged = config.block_size, config.block_count, config.nsa_variant == "merged"
    if config.nsa_variant not in ("paper", "merged") or len(layout.keys.positions) <= size * count:
        return None
    nsa = branch_functions(attention, q)
    q, keys, values = q[layout.queries], layout.keys.take(k), layout.keys.take(v)
    lengths = {"cu_seqlens": layout.cu_seqlens, "cu_seqlens_k": layout.keys.cu_seqlens}
    options = {**lengths, "block_size": size, "scale": attention.scaling}
    choice = {"window_size": config.window_size, "spread": config.block_spread} if merged else {}

    turns = [q]
    if merged and config.block_per_head:  # one query head of each KV head at a time
        turns = q.unflatten(1, (keys.shape[1], -1)).unbind(2)
    chosen = []
    for turn in turns:
        if choice.get("spread"):
            lse = text_lse(turn, layout.text_keys.take(k), layout.text_seen, attention.scaling)
        else:
            _, lse = nsa.compressed_attention(turn, keys, values, **options)
        chosen.append(nsa.select_blocks(turn, keys, lse, **options, block_count=count, **choice))
    past = len(keys) - len(q)
    return count_choices(torch.cat(chosen), size, count, choice.get("window_size"), past).cpu()


def text_lse(q: torch.Tensor, text_k: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 [N, H]: the log-sum-exp of the logits of queries q [N, H, D] for the first `seen` [N] of keys [T, G, D]."""
    groups, rows = text_k.shape[1], max(1, MAX_SCORES // max(1, q.shape[1] * len(text_k)))
    position, parts = torch.arange(len(text_k), device=q.device), []
    for own, before in zip(q.split(rows), seen.split(rows), strict=True):
        scores = torch.einsum("ngrd,tgd->ngrt", own.float().unflatten(1, (groups, -1)), text_k.float()) * scale
        hidden = position >= before[:, None]
        parts.append(scores.masked_fill(hidden[:, None, None], -torch.inf).logsumexp(-1).flatten(1))
    return torch.cat(parts)


def count_choices(
    blocks: torch.Tensor, block_size: int, block_count: int, window_size: int | None = None, past: int = 0
) -> torch.Tensor:
    """How often each block of one stream was chosen, and could have been, by tokens that had to choose.

    Those are the tokens with more than `block_count` blocks before and around them. The first block and those of the
    window of a token are no choice.

    Args:
        blocks: int32 [KV heads, tokens, block_count], of `select_blocks`, -1 for none.
        window_size: as given to `select_blocks`.
        past: tokens of the stream before the first of these.

    Returns:
        float64 [blocks, 2].
    """
    groups, n, _ = blocks.shape
    index = past + torch.arange(n, device=blocks.device)
    total = -(-(past + n) // block_size)
    choosing = index // block_size >= block_count
    window_size = block_size + 1 if window_size is None else window_size
    first = (index[choosing] + 1 - window_size).clamp(min=0) // block_size  # block of the window
    picked = blocks[:, choosing]
    free = (picked > 0) & (picked < first[:, None])
    chosen = picked[free].long().bincount(minlength=total).double()
    tokens = first.bincount(minlength=total + 1)
    could = groups * tokens.flip(0).cumsum(0).flip(0)[1 : total + 1].double()  # tokens whose window begins later
    could[0] = 0
    return torch.stack([chosen, could], -1)


def branch_functions(attention, q: torch.Tensor):
    """`nsa_triton` or `nsa_torch`, of the files that this layer runs."""
    code = sys.modules[attention.uses_triton.__module__]
    triton = attention.uses_triton(q)
    return sys.modules[(code.nsa_attention_triton if triton else code.nsa_attention_torch).__module__]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def patch_shares(received: list[torch.Tensor]) -> list[float]:
    """The part of all that videos receive that each of their temporal patches does.

    Args:
        received: of each video, [temporal patches, tokens of a patch], from `AnswerAttention.received`.
    """
    shares = torch.cat([video.sum(1) for video in received]).double()
    return (shares / shares.sum()).nan_to_num().tolist()


def pick_moments(shares: list[float], most: int = MOMENTS, least: float = 0.0) -> list[int]:
    """Indices of the largest shares, the largest first.

    They are above 0, from `least` on, at least a quarter of the largest, and not beside each other.
    """
    distance, picked = 1 + len(shares) // (8 * most), []
    least = max(least, LEAST_OF_FIRST * max((share for share in shares if share > 0), default=0.0))
    rated = [i for i, share in enumerate(shares) if share > 0 and share >= least]  # no nan
    for i in sorted(rated, key=lambda i: -shares[i]):
        if len(picked) < most and all(abs(i - j) >= distance for j in picked):
            picked.append(i)
    return picked


def patch_frame(processor, pixels: torch.Tensor, grid: list[int], index: int) -> np.ndarray:
    """uint8 [height, width, 3]: the first frame of a temporal patch, from the model's input.

    Args:
        processor: the video processor.
        pixels: [patches, numbers of a patch], `pixel_values_videos` of one video.
        grid: its patches along time, height and width.
        index: of the temporal patch.
    """
    _, rows, columns = grid
    size, merge = processor.patch_size, processor.merge_size
    patch = pixels[index * rows * columns : (index + 1) * rows * columns].float()
    patch = patch.view(rows // merge, columns // merge, merge, merge, 3, processor.temporal_patch_size, size, size)
    frame = patch[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * size, columns * size)
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    return ((frame * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
