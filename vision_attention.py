"""Attention of a decoder layer of VideoNSA: sparse for vision queries, dense for text queries.

`SparseAttention` goes before the attention of either backbone. The table `VISION_ATTENTION` has a function for each
variant; what they compute is in `nsa_torch.py` (the paper's method), `nsa_merged.py` and `nsa_released.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_videonsa import SparseTextConfig
from .nsa_checks import BRANCHES
from .nsa_merged import merged_attention
from .nsa_released import released_attention
from .nsa_torch import nsa_attention as nsa_attention_torch
from .nsa_triton import available as triton_available
from .nsa_triton import nsa_attention as nsa_attention_triton
from .sequence_parallel import SequenceShards, forward_sharded
from .transformers_compat import CACHE, Substitute
from .vision_layout import TextChunk, VisionLayout

# New gates have weights N(0, GATE_STD) and no bias.
GATE_STD = 0.02


class GateLinear(nn.Linear):
    """A linear layer of the gates: a class of its own, by which `_init_weights` tells it from the others."""


class SparseAttention(nn.Module):
    """Attention of a decoder layer: sparse for vision queries, dense for text queries, stock without vision queries.

    Comes before the class of transformers, `stock_class`, among the bases of an attention module.
    """

    stock_class: type[nn.Module]

    def __init__(self, config: SparseTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.has_gates = config.nsa_variant != "merged"
        if self.has_gates:
            self.g_proj_1 = GateLinear(config.hidden_size, config.hidden_size)
            self.g_proj_2 = GateLinear(config.hidden_size, len(BRANCHES) * config.num_attention_heads)

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Weights of the compression, selection and window branch: [..., hidden] -> [..., heads, 3] in (0, 1)."""
        if not self.has_gates:
            raise ValueError(
                f"nsa_variant {self.config.nsa_variant!r} needs gates, which a model made with 'merged' does not have; "
                "load the checkpoint with the variant that you want"
            )
        logits = self.g_proj_2(nn.functional.gelu(self.g_proj_1(hidden_states)))
        return (logits / self.config.gate_temperature).sigmoid().unflatten(-1, (-1, len(BRANCHES)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_layout: VisionLayout | SequenceShards | None = None,
        keys_only: bool = False,
        **kwargs,
    ):
        """As in transformers, with the layout of a call that has vision queries.

        Projections, rotary and cache are those of the stock forward, which calls an attention function by its name in
        the configuration. A call with vision queries puts the name of `_attend_sparsely` there.

        Returns:
            the output [batch, length, hidden] and the attention weights [batch, heads, length, total] or None. As in
            stock, only attn_implementation="eager" has weights. With vision queries, they are computed only if
            `output_attentions` asks for them, and only for text queries; the rows of vision queries are 0. With
            `keys_only`, nothing attends: in place of the weights are the keys and values of the cached and new tokens.
        """
        if isinstance(vision_layout, SequenceShards):
            return forward_sharded(self, hidden_states, vision_layout, **kwargs)

        if keys_only:
            # One head of queries, which the rotary wants, costs nothing.
            parts = {"q_proj": lambda x: x.new_zeros(*x.shape[:-1], self.head_dim), "o_proj": nn.Identity()}
            return self.stock_forward(KEYS_ONLY, hidden_states, parts, **kwargs)

        if vision_layout is None:
            output, weights = super().forward(hidden_states, **kwargs)
            if self.has_gates and self.training and torch.is_grad_enabled():
                # Data parallelism needs every parameter in the graph of every rank, also for a text-only batch.
                output = output + 0.0 * self.gates(hidden_states[:, :1]).sum()
            return output, weights

        gates = None
        # Data parallelism needs the gates also where a batch has hidden all of its vision tokens.
        if self.config.nsa_variant != "merged" and (self.training or len(vision_layout.queries) > 0):
            gates = self.gates(hidden_states.flatten(0, 1)[vision_layout.queries])  # [N, heads, 3]
        attend = SparseCall(self, gates, vision_layout)
        outputs = self.stock_forward(SPARSE_ATTENTION, hidden_states, attend=attend, **kwargs)
        self.check_called(attend.done)
        return outputs

    def stock_forward(self, function: str, hidden_states: torch.Tensor, parts: dict | None = None, **kwargs):
        """The forward of the class of transformers, with the attention function of this name, and with `parts` in place
        of its own layers."""
        config = Substitute(self.config, _attn_implementation=function)
        substitute = Substitute(self, config=config, **(parts or {}))
        return self.stock_class.forward(substitute, hidden_states, **kwargs)

    @staticmethod
    def check_called(done: bool) -> None:
        """Raise a RuntimeError if the stock forward has not called our attention function."""
        if not done:
            raise RuntimeError(
                "the attention of transformers did not call the attention function that its configuration names: this "
                "version of transformers and VideoNSA do not fit together"
            )

    def attend(self, q, k, v, gates, layout: VisionLayout, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of one call: sparse for its vision queries, dense for its text queries.

        Args:
            q: [batch, heads, length, head_dim] of the new tokens, after the rotary, like the keys.
            k, v: [batch, KV heads, total or more, head_dim] of the cached and new tokens.
            gates: [N, heads, 3] of the N vision queries; None for the variant "merged".
            weights: [batch, heads, length, total] of zeros, whose rows of text queries are filled; or None.

        Returns:
            [batch, length, heads, head_dim]; 0 for padding.
        """
        batch, _, length, _ = q.shape
        k = k.to(v.dtype)  # under autocast the rotary factors are fp32
        q = q.to(v.dtype).transpose(1, 2).flatten(0, 1)  # [batch * length, heads, dim]
        has_vision = gates is not None or len(layout.queries) > 0
        if layout.observe is not None and has_vision:
            gates = layout.observe(self, q, k, v, gates, layout)

        output = q.new_zeros(q.shape)  # padding stays 0
        if has_vision:
            VISION_ATTENTION[self.config.nsa_variant](self, output, q, k, v, gates, layout)

        for chunk in layout.text_chunks(self.num_key_value_groups):
            if weights is None:
                dense = self._dense(q[chunk.queries], k, v, chunk)
            else:
                dense = self._dense_with_weights(q[chunk.queries], k, v, chunk, weights)
            output[chunk.queries] += dense.to(output.dtype)
        return output.unflatten(0, (batch, length))

    def uses_triton(self, q: torch.Tensor) -> bool:
        """Whether such queries go to the kernels."""
        backend = self.config.nsa_backend
        return backend == "triton" or (backend == "auto" and triton_available(q))

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: TextChunk) -> torch.Tensor:
        """Causal attention of text queries q [T, heads, dim] over all tokens of their sample -> [T, heads, dim]."""
        groups = k.shape[1]
        folded = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [groups, r, T, dim]
        k, v = (x[chunk.row, :, chunk.keys].unsqueeze(1) for x in (k, v))  # [groups, 1, keys, dim]
        options = {"dropout_p": self.attention_dropout if self.training else 0.0, "scale": self.scaling}
        attend = nn.functional.scaled_dot_product_attention
        if chunk.mask is not None:
            # The heads of a group become query rows of their KV head.
            mask = chunk.mask.repeat(folded.shape[1], 1)
            out = attend(folded.flatten(1, 2).unsqueeze(1), k, v, attn_mask=mask, **options)
            return out.unflatten(2, folded.shape[1:3]).squeeze(1).permute(2, 0, 1, 3).flatten(1, 2)

        k, v = (x.expand(-1, folded.shape[1], -1, -1) for x in (k, v))  # without a copy
        if len(q) == k.shape[2]:
            out = attend(folded, k, v, is_causal=True, **options)
        else:
            out = attend(folded, k, v, attn_mask=causal_lower_right(len(q), k.shape[2]), **options)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _dense_with_weights(self, q, k, v, chunk: TextChunk, weights: torch.Tensor) -> torch.Tensor:
        """As `_dense`, and write the attention probabilities to `weights` [batch, heads, length, total]."""
        groups = k.shape[1]
        mask = chunk.mask
        if mask is None:
            count = chunk.keys.stop - chunk.keys.start
            mask = q.new_ones(len(q), count, dtype=torch.bool).tril(count - len(q))
        folded = q.unflatten(1, (groups, -1))  # [T, groups, r, dim]
        scores = torch.einsum("tgrd,gkd->grtk", folded, k[chunk.row, :, chunk.keys]) * self.scaling
        scores = scores.masked_fill(~mask, float("-inf")).flatten(0, 1)
        local = chunk.queries - chunk.row * weights.shape[2]
        weights[chunk.row, :, local, chunk.keys] = scores.softmax(-1, dtype=torch.float32).to(weights.dtype)

        rows = weights[chunk.row, :, local, chunk.keys].unflatten(0, (groups, -1))  # in the graph of the output
        rows = nn.functional.dropout(rows, self.attention_dropout, self.training)
        return torch.einsum("grtk,gkd->tgrd", rows.to(v.dtype), v[chunk.row, :, chunk.keys]).flatten(1, 2)


def untrained_gates(layers: list[SparseAttention]) -> bool:
    """Whether the gates of all layers are as they were made; waits for the device. False if it cannot be seen.

    Every step of training moves the biases from 0. The weights' deviation tells gates that were made by other code,
    which may have trained them without biases.
    """
    gates = [gate for layer in layers if layer.has_gates for gate in (layer.g_proj_1, layer.g_proj_2)]
    for gate in gates:
        bias, weight = gate.bias, gate.weight
        # Sharded weights, and those that are on a disk.
        if type(bias.data) is not torch.Tensor or bias.is_meta or bias.numel() == 0 or bias.any():
            return False

        # Quantized weights are not compared.
        plain = type(weight.data) is torch.Tensor and weight.is_floating_point() and not weight.is_meta
        if plain and not spreads_as_made(weight):
            return False
    return bool(gates)


def spreads_as_made(weight: torch.Tensor) -> bool:
    """Whether the deviation of a gate's weight is that of a new one: within five standard errors, and rounding."""
    tolerance = GATE_STD * (5 / (2 * weight.numel()) ** 0.5 + 0.01)
    return abs(float(weight.detach().float().std()) - GATE_STD) <= tolerance


# Vision attention of each variant: writes the rows of vision queries of output [batch * length, heads, dim], and with
# "released" a term of text rows, from q of the same shape, k and v [batch, KV heads, total or more, dim], gates
# [N, heads, 3], and the layout of the call.


def _paper(attention: SparseAttention, output, q, k, v, gates, layout: VisionLayout) -> None:
    config = attention.config
    attend = nsa_attention_triton if attention.uses_triton(q) else nsa_attention_torch
    output[layout.queries] = attend(
        q[layout.queries],
        layout.keys.take(k),
        layout.keys.take(v),
        gates,
        layout.cu_seqlens,
        cu_seqlens_k=layout.keys.cu_seqlens,
        block_size=config.block_size,
        block_count=config.block_count,
        window_size=config.window_size,
        scale=attention.scaling,
    )


def _merged(attention: SparseAttention, output, q, k, v, gates, layout: VisionLayout) -> None:
    config = attention.config
    output[layout.queries] = merged_attention(
        q[layout.queries],
        layout.keys.take(k),
        layout.keys.take(v),
        layout.text_keys.take(k),
        layout.text_keys.take(v),
        layout.text_seen,
        layout.cu_seqlens,
        layout.text_keys.cu_seqlens,
        cu_seqlens_k=layout.keys.cu_seqlens,
        block_size=config.block_size,
        block_count=config.block_count,
        window_size=config.window_size,
        spread=config.block_spread,
        per_head=config.block_per_head,
        remainder=config.block_remainder,
        triton=attention.uses_triton(q),
        scale=attention.scaling,
    )


def _released(attention: SparseAttention, output, q, k, v, gates, layout: VisionLayout) -> None:
    """All rows of the samples with vision queries, text rows without their dense term."""
    config = attention.config
    counts = [len(sample.stream.vision_rows) for sample in layout.streams]
    for sample, own_gates in zip(layout.streams, gates.split(counts), strict=True):
        output[sample.queries] = released_attention(
            q[sample.queries],
            k[sample.row, :, sample.positions].transpose(0, 1),
            v[sample.row, :, sample.positions].transpose(0, 1),
            own_gates,
            sample.stream,
            triton=attention.uses_triton(q),
            block_size=config.block_size,
            block_count=config.block_count,
            window_size=config.window_size,
            block_causal=config.block_causal,
            scale=attention.scaling,
        )


VISION_ATTENTION = {"paper": _paper, "merged": _merged, "released": _released}

SPARSE_ATTENTION = "videonsa"


@dataclass
class SparseCall:
    """What `_attend_sparsely` needs of one call of one layer, beyond what every attention function gets."""

    attention: SparseAttention
    gates: torch.Tensor | None  # [N, heads, 3], of the vision queries
    layout: VisionLayout
    done: bool = False


def _attend_sparsely(
    module, q, k, v, attention_mask, *, attend: SparseCall, output_attentions: bool | None = None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers, for the calls with vision queries."""
    attend.done = True
    config, layout = attend.attention.config, attend.layout
    wanted = config.output_attentions if output_attentions is None else output_attentions
    weights = None
    if wanted and config._attn_implementation == "eager":
        weights = q.new_zeros(*q.shape[:3], layout.total)
    return attend.attention.attend(q, k, v, attend.gates, layout, weights), weights


ALL_ATTENTION_FUNCTIONS.register(SPARSE_ATTENTION, _attend_sparsely)


# ----------------------------------------------------------------------------------------------------------------------
# The last layer, where its output is read at the last tokens alone
# ----------------------------------------------------------------------------------------------------------------------

KEYS_ONLY = "videonsa_keys_only"


def _keys_and_values(module, q, k, v, attention_mask, **kwargs):
    """An attention function of transformers that returns the keys and values in place of weights."""
    return q.transpose(1, 2), (k, v)


ALL_ATTENTION_FUNCTIONS.register(KEYS_ONLY, _keys_and_values)


@dataclass
class WrittenCache:
    """Stands for a cache in a layer whose keys and values of this call it has already."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


def only_last_queries(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A hook before the last decoder layer: as `VisionLayout.last` asks, all tokens become keys and values in the
    cache, as they would, but only the last ones go through the layer."""
    layout = kwargs.get("vision_layout")
    if not isinstance(layout, VisionLayout) or layout.last is None:
        return None
    (hidden_states,) = args
    inputs = {name: kwargs.get(name) for name in ("position_embeddings", "attention_mask", CACHE)}
    _, written = layer.self_attn(layer.input_layernorm(hidden_states), keys_only=True, **inputs)

    last = layout.last.length
    places = tuple(x[..., -last:, :] for x in kwargs["position_embeddings"])
    changed = {"position_embeddings": places, "vision_layout": layout.last, CACHE: WrittenCache(*written)}
    return (hidden_states[:, -last:],), {**kwargs, **changed}
