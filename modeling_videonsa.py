"""VideoNSA: Qwen2.5-VL whose vision tokens attend through Native Sparse Attention (arXiv 2510.02295).

Only what differs from transformers' Qwen2.5-VL stands here: where the vision tokens of a call are (`VisionLayout`), the
attention module, rotary positions by the rule of the Qwen2-VL paper, and loading. The attention itself is in
`nsa_torch.py` (the specification) and `nsa_triton.py`, the fields in `configuration_videonsa.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_masks_for_generate
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLAttention,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)

from .configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from .nsa_released import Stream, released_attention
from .nsa_torch import merged_attention as merged_attention_torch
from .nsa_torch import nsa_attention as nsa_attention_torch
from .nsa_triton import available as triton_available
from .nsa_triton import merged_attention as merged_attention_triton
from .nsa_triton import nsa_attention as nsa_attention_triton

# Checkpoints come in the key layouts of stock Qwen2.5-VL, but transformers looks the renaming up by class name.
for _name in ("VideoNSAForConditionalGeneration", "VideoNSAModel"):
    register_checkpoint_conversion_mapping(
        _name, get_checkpoint_conversion_mapping("Qwen2_5_VLForConditionalGeneration"), overwrite=True
    )

MAX_MASK = 2**26  # elements of the boolean mask of one chunk of text queries
MAX_ROWS = 256  # text queries of such a chunk, so that few of their products are masked


@dataclass
class TextChunk:
    """Adjacent text queries of one sample, and the keys up to the last of them."""

    queries: torch.Tensor  # int64 [T], among the batch * length tokens of the call
    row: int  # of the batch
    keys: slice  # of the row's cached and new tokens
    # bool [T, keys], made anew by each use: see VisionLayout.text_chunks. None for the last T of the keys, all causal.
    mask: torch.Tensor | None


@dataclass
class VisionLayout:
    """Where the vision and text tokens of one forward call stand; made once, read by every layer.

    A sample is a row of the batch, or one of the sequences packed into a row. Vision tokens are listed sample by
    sample, in the order of the stream.
    """

    queries: torch.Tensor  # int64 [N], vision queries among the batch * length tokens of the call
    key_rows: torch.Tensor  # int64 [M], batch row of each vision key
    key_positions: torch.Tensor  # int64 [M], and its position among the cached and new tokens of that row
    cu_seqlens: torch.Tensor  # int32 [samples + 1], of queries
    cu_seqlens_k: torch.Tensor  # int32 [samples + 1], of keys
    text: list[tuple[torch.Tensor, int, int, int]]  # (adjacent text queries, row, first and last + 1 key of theirs)
    text_rows: torch.Tensor  # int64 [T], batch row of each text key
    text_positions: torch.Tensor  # int64 [T], and its position among the cached and new tokens of that row
    text_seen: torch.Tensor  # int32 [N], how many text keys of its sample come before a vision query
    cu_seqlens_text: torch.Tensor  # int32 [samples + 1], of text keys
    valid: torch.Tensor | None  # bool [batch, total], False for padding
    length: int  # new tokens per row
    total: int  # cached and new tokens per row
    observe: Callable | None = None  # called by each layer: see `VideoNSAModel.forward`
    # Of each sample with a vision query, for the released variant: its stream, queries as above, row, and key positions
    streams: list[tuple[Stream, torch.Tensor, int, torch.Tensor]] = ()

    @classmethod
    def make(cls, vision, length, valid=None, starts=None, observe=None, make_stream=None) -> "VisionLayout":
        """From vision bool [batch, total], of which the last `length` tokens of each row are new; valid bool [batch,
        total] is False for padding, starts bool [batch, total] True where a packed sample begins. make_stream makes a
        `Stream` of its first two arguments, if the variant needs one."""
        batch, total = vision.shape
        starts = torch.zeros_like(vision) if starts is None else starts.clone()
        starts[:, 0] = True
        sample = starts.flatten().cumsum(0) - 1  # [batch * total]
        vision = vision if valid is None else vision & valid
        new = torch.arange(batch * total, device=vision.device).view(batch, total)[:, total - length :].flatten()

        edges = [*starts.flatten().nonzero().squeeze(1).tolist(), batch * total]
        samples = [(start // total, start % total, (stop - 1) % total + 1) for start, stop in pairwise(edges)]

        def cu_seqlens(index):
            counts = sample[index].bincount(minlength=len(samples))
            return nn.functional.pad(counts.cumsum(0), (1, 0)).int()

        keys = vision.flatten().nonzero().squeeze(1)
        queries = vision.flatten()[new].nonzero().squeeze(1)
        is_text = ~vision if valid is None else ~vision & valid
        text = is_text.flatten()[new].nonzero().squeeze(1)
        text_keys = is_text.flatten().nonzero().squeeze(1)
        cu_seqlens_text = cu_seqlens(text_keys)
        text_before = is_text.flatten().cumsum(0).int()[new[queries]]  # of all samples
        # Runs of adjacent text queries of a sample: their keys end at the last of them.
        place, owner = new[text], sample[new[text]]
        begins = torch.ones_like(text, dtype=torch.bool)
        begins[1:] = (place.diff() != 1) | (owner.diff() != 0)
        run_edges = [*begins.nonzero().squeeze(1).tolist(), len(text)]
        parts = []
        for (a, b), owner_of_run, last in zip(
            pairwise(run_edges), owner[begins].tolist(), place[begins.roll(-1)].tolist(), strict=True
        ):
            row, start, _ = samples[owner_of_run]
            parts.append((text[a:b], row, start, last % total + 1))
        streams = []
        for row, start, stop in samples if make_stream else []:
            positions = torch.arange(start, stop, device=vision.device)
            positions = positions if valid is None else positions[valid[row, start:stop]]
            query_positions = positions[positions >= total - length]
            if vision[row, query_positions].any():
                stream = make_stream(vision[row, positions], len(query_positions))
                streams.append((stream, query_positions + row * length - (total - length), row, positions))
        return cls(
            queries=queries,
            key_rows=keys // total,
            key_positions=keys % total,
            cu_seqlens=cu_seqlens(new[queries]),
            cu_seqlens_k=cu_seqlens(keys),
            text=parts,
            text_rows=text_keys // total,
            text_positions=text_keys % total,
            text_seen=text_before - cu_seqlens_text[sample[new[queries]]],
            cu_seqlens_text=cu_seqlens_text,
            valid=valid,
            length=length,
            total=total,
            observe=observe,
            streams=streams,
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "VisionLayout":
        """This layout on another device; accelerate calls it where layers are spread over several."""
        if self.queries.device == torch.device(device):
            return self
        moved = {
            f.name: x.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(x := getattr(self, f.name), torch.Tensor)
        }
        text = [(queries.to(device, non_blocking=non_blocking), *rest) for queries, *rest in self.text]
        streams = [
            tuple(x if isinstance(x, int) else x.to(device, non_blocking=non_blocking) for x in part)
            for part in self.streams
        ]
        return replace(self, **moved, text=text, streams=streams)

    def text_chunks(self, heads_per_group: int):
        """Yield the text queries as `TextChunk`s, each with the keys up to its last query.

        Runs without padding stay whole where a fused kernel needs no mask: from the first token on, and on a GPU.
        Masks, repeated per head of a group, fit into `MAX_MASK`.
        """
        for queries, row, start, stop in self.text:
            unmasked = self.valid is None and (queries.is_cuda or len(queries) == stop - start)
            if unmasked:
                yield TextChunk(queries, row, slice(start, stop), None)
                continue
            rows = max(1, min(MAX_ROWS, MAX_MASK // (heads_per_group * (stop - start))))
            first = stop - len(queries)
            for part in queries.split(rows):
                first += len(part)
                keys = slice(start, first)
                position = torch.arange(first - len(part), first, device=part.device)  # of cached and new tokens
                mask = torch.arange(start, first, device=part.device) <= position[:, None]
                if self.valid is not None:
                    mask = mask & self.valid[row, keys]
                yield TextChunk(part, row, keys, mask)


class GateLinear(nn.Linear):
    """A linear layer of the gates: a class of its own, by which `_init_weights` tells it from the others."""


class VideoNSAAttention(Qwen2_5_VLAttention):
    """Attention of a decoder layer: sparse for vision queries, dense for text queries, stock without vision queries."""

    def __init__(self, config: VideoNSATextConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.has_gates = config.nsa_variant != "merged"
        if self.has_gates:
            self.g_proj_1 = GateLinear(self.hidden_size, self.hidden_size)
            self.g_proj_2 = GateLinear(self.hidden_size, 3 * self.num_heads)

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Weights of the compression, selection and window branch: [..., hidden] -> [..., heads, 3] in (0, 1)."""
        if not self.has_gates:
            raise ValueError(
                f"nsa_variant {self.config.nsa_variant!r} needs gates, which a model made with 'merged' does not have; "
                "load the checkpoint with the variant that you want"
            )
        logits = self.g_proj_2(nn.functional.gelu(self.g_proj_1(hidden_states)))
        return (logits / self.config.gate_temperature).sigmoid().unflatten(-1, (-1, 3))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        vision_layout: VisionLayout | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in Qwen2.5-VL, with the layout of a call that has vision queries (attention weights are then None)."""
        if vision_layout is None:
            output, weights = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if self.has_gates and self.training and torch.is_grad_enabled():
                # Data parallelism needs every parameter in the graph of every rank, also for a text-only batch.
                output = output + 0.0 * self.gates(hidden_states[:, :1]).sum()
            return output, weights

        batch, length, _ = hidden_states.shape
        q, k, v = (
            proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [batch, heads, length, dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k = k.to(v.dtype)  # under autocast the rotary factors are fp32
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        q = q.to(v.dtype).transpose(1, 2).flatten(0, 1)  # [batch * length, heads, dim]
        output = q.new_zeros(q.shape)  # padding stays 0

        queries, rows, positions = vision_layout.queries, vision_layout.key_rows, vision_layout.key_positions
        if self.config.nsa_variant == "merged":
            output[queries] = self._merged(q[queries], k, v, vision_layout)
        else:
            gates = self.gates(hidden_states.flatten(0, 1)[queries])  # [N, heads, 3]
            if vision_layout.observe is not None:
                gates = vision_layout.observe(self, q, k, v, gates, vision_layout)
            if self.config.nsa_variant == "released":
                self._released(output, q, k, v, gates, vision_layout)
            else:
                keys = (k[rows, :, positions], v[rows, :, positions])
                output[queries] = self._sparse(q[queries], *keys, gates, vision_layout)
        for chunk in vision_layout.text_chunks(self.num_key_value_groups):
            output[chunk.queries] += self._dense(q[chunk.queries], k, v, chunk).to(output.dtype)
        return self.o_proj(output.view(batch, length, -1)), None

    def _sparse(self, q, k, v, gates, layout: VisionLayout) -> torch.Tensor:
        """Sparse attention of vision queries q [N, heads, dim] over vision keys and values k, v [M, groups, dim]."""
        return (nsa_attention_triton if self.uses_triton(q) else nsa_attention_torch)(
            q,
            k,
            v,
            gates,
            layout.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens_k,
            block_size=self.config.block_size,
            block_count=self.config.block_count,
            window_size=self.config.window_size,
            scale=self.scaling,
        )

    def _merged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        """One softmax of vision queries q [N, heads, dim] over text and chosen blocks, k and v [batch, groups, total,
        dim]."""
        rows, positions = layout.key_rows, layout.key_positions
        text_rows, text_positions = layout.text_rows, layout.text_positions
        return (merged_attention_triton if self.uses_triton(q) else merged_attention_torch)(
            q,
            k[rows, :, positions],
            v[rows, :, positions],
            k[text_rows, :, text_positions],
            v[text_rows, :, text_positions],
            layout.text_seen,
            layout.cu_seqlens,
            layout.cu_seqlens_text,
            cu_seqlens_k=layout.cu_seqlens_k,
            block_size=self.config.block_size,
            block_count=self.config.layer_block_count(self.layer_idx),
            window_size=self.config.window_size,
            mass=self.config.block_mass,
            spread=self.config.block_spread,
            per_head=self.config.block_per_head,
            remainder=self.config.block_remainder,
            scale=self.scaling,
        )

    def _released(self, output, q, k, v, gates, layout: VisionLayout) -> None:
        """Add to `output` what `released_attention` gives to the samples with vision queries."""
        counts = [len(stream.vision_rows) for stream, *_ in layout.streams]
        for (stream, queries, row, keys), own_gates in zip(layout.streams, gates.split(counts), strict=True):
            output[queries] = released_attention(
                q[queries],
                k[row, :, keys].transpose(0, 1),
                v[row, :, keys].transpose(0, 1),
                own_gates,
                stream,
                triton=self.uses_triton(q),
                block_size=self.config.block_size,
                block_count=self.config.block_count,
                window_size=self.config.window_size,
                block_causal=self.config.block_causal,
                scale=self.scaling,
            )

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


class VideoNSATextModel(Qwen2_5_VLTextModel):
    """The text decoder of Qwen2.5-VL with `VideoNSAAttention` in every layer."""

    config: VideoNSATextConfig
    _keys_to_ignore_on_load_unexpected = [r"\.g_proj_[12]\."]  # of a checkpoint with gates, which "merged" has not

    def __init__(self, config: VideoNSATextConfig):
        config.validate_nsa()
        config.validate_variant()
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = VideoNSAAttention(config, i)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, GateLinear):
            init.normal_(module.weight, mean=0.0, std=0.02)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        vision_mask: torch.Tensor | None = None,
        observe: Callable | None = None,
        **kwargs,
    ):
        """As in Qwen2.5-VL, with vision_mask bool [batch, length]: which new tokens are vision; None for none."""
        if vision_mask is not None and self.config.nsa_variant == "released":
            vision_mask = self._vision_by_position(position_ids)
        if vision_mask is not None:
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            vision_mask = torch.cat([self._cached_vision_mask(past_key_values, past, vision_mask), vision_mask], 1)
            kwargs["vision_layout"] = self._layout(vision_mask, past, attention_mask, position_ids, observe)
            attention_mask = dict.fromkeys(("full_attention", "sliding_attention"))  # "prepared": no [S, S] mask
        elif getattr(past_key_values, "vision_mask", None) is not None and not torch.compiler.is_compiling():
            # What comes after the cached tokens is text now, also where a longer cache was cut back or reset.
            mask = past_key_values.vision_mask
            kept = torch.arange(mask.shape[1], device=mask.device) < past_key_values.get_seq_length()
            past_key_values.vision_mask = mask & kept
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        cache = getattr(outputs, "past_key_values", None)
        if vision_mask is not None and cache is not None:
            cache.vision_mask = vision_mask  # what is needed to continue the stream in a later call
        return outputs

    @staticmethod
    def _vision_by_position(position_ids) -> torch.Tensor | None:
        """bool [batch, length]: tokens whose time, row and column differ, as the public code tells vision from text.
        The first patch of an image or video, and others on that diagonal, count as text; without positions, or with
        those of text alone, all tokens do."""
        if position_ids is None or position_ids.ndim < 3:
            return None
        time, row, column = position_ids[-3:]
        mask = (time != row) | (time != column)
        return mask if mask.any() else None

    @staticmethod
    def _cached_vision_mask(cache, past: int, like: torch.Tensor) -> torch.Tensor:
        """bool [batch, past]. Tokens cached since the mask was stored came in calls without vision: they are text."""
        mask = getattr(cache, "vision_mask", None) if past else None
        if mask is None:
            return like.new_zeros(like.shape[0], past)
        mask = mask[:, :past].repeat_interleave(like.shape[0] // mask.shape[0], 0)
        return nn.functional.pad(mask, (0, past - mask.shape[1]))

    def _layout(self, vision_mask, past, attention_mask, position_ids, observe) -> VisionLayout:
        batch, total = vision_mask.shape
        valid = starts = None
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (batch, total):
                got = list(getattr(attention_mask, "shape", [])) or type(attention_mask).__name__
                raise ValueError(f"attention_mask must be [batch, cached + new tokens] = {[batch, total]}, got {got}")
            valid = attention_mask.to(vision_mask.device, torch.bool)
            valid = None if valid.all() else valid
        elif past == 0 and position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
            # Samples packed into a row: its text positions (the first of four) start anew with each.
            text_positions = position_ids[0].expand(batch, -1)
            starts = text_positions.diff(dim=1, prepend=text_positions[:, :1] - 1) != 1
        make_stream = None
        if self.config.nsa_variant == "released":
            make_stream = functools.partial(
                Stream.make, block_size=self.config.block_size, block_count=self.config.block_count
            )
        return VisionLayout.make(vision_mask, total - past, valid, starts, observe, make_stream)


class VideoNSAModel(Qwen2_5_VLModel):
    """Vision tower and text decoder. Finds the vision tokens of a call and numbers positions as Qwen2-VL does."""

    config: VideoNSAConfig

    def __init__(self, config: VideoNSAConfig):
        super(Qwen2_5_VLModel, self).__init__(config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = VideoNSATextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        output_gates: bool = False,
        observe: Callable | None = None,
        **kwargs,
    ):
        """As in Qwen2.5-VL.

        Vision tokens are told by `input_ids`; where only `inputs_embeds` are given, by `mm_token_type_ids`, which are
        needed once image and video features stand in them.

        Args:
            output_gates: also return `gates`, per layer [batch, length, heads, 3] in the order compression, selection,
                window, 0 for tokens that are not vision; empty when the call computes no sparse attention with gates.
            observe: called in each layer that has vision queries, before it attends, with its attention module, q
                [batch * length, heads, dim], k and v [batch, KV heads, total, dim] of all tokens after the rotary, the
                gates of its vision queries [N, heads, 3], and the `VisionLayout`; returns the gates to use. Not called
                by the variant "merged", which has none.
        """
        gates = []
        if output_gates:
            observe = functools.partial(_keep_gates, gates, observe)
        if mm_token_type_ids is None and input_ids is not None:
            mm_token_type_ids = self.token_types(input_ids)  # without it, stock falls back to 1-D positions
        if input_ids is not None and past_key_values is not None:
            self._drop_cached_features(input_ids, past_key_values, kwargs)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            vision_mask=self._vision_mask(input_ids, inputs_embeds, mm_token_type_ids),
            observe=observe,
            **kwargs,
        )
        cache = getattr(outputs, "past_key_values", None)
        if cache is not None and not torch.compiler.is_compiling():
            self._keep_rope_deltas(cache, position_ids, attention_mask)
        return _with_gates(outputs, gates) if output_gates else outputs

    def _keep_rope_deltas(self, cache, position_ids, attention_mask) -> None:
        """Leave with the cache what to add to a later token's index for its position (see `get_rope_index`)."""
        if position_ids is None:
            cache.rope_deltas = self.rope_deltas
        elif attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
            tokens = cache.get_seq_length() if attention_mask is None else attention_mask.sum(1)
            largest = position_ids.view(-1, *position_ids.shape[-2:])[-3:].amax((0, 2))  # [batch]
            cache.rope_deltas = (largest + 1 - tokens)[:, None]

    def compute_3d_position_ids(self, *, past_key_values=None, inputs_embeds, mm_token_type_ids=None, **kwargs):
        """As in Qwen2.5-VL, but later tokens are offset by what their own cache, not the last call, came to."""
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            self.rope_deltas = None
        elif mm_token_type_ids is not None and mm_token_type_ids[:, -inputs_embeds.shape[1] :].any():
            raise ValueError("images and videos over a cache need position_ids: get_rope_index of the whole sequence")
        else:
            self.rope_deltas = getattr(past_key_values, "rope_deltas", self.rope_deltas)
        return super().compute_3d_position_ids(
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )

    def token_types(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Modality of each token: 0 text, 1 image, 2 video."""
        return (input_ids == self.config.image_token_id).int() + 2 * (input_ids == self.config.video_token_id).int()

    def _vision_mask(self, input_ids, inputs_embeds, mm_token_type_ids) -> torch.Tensor | None:
        """bool [batch, length], or None when the call has no vision query or the variant is dense."""
        self.config.text_config.validate_variant()
        new = input_ids if input_ids is not None else inputs_embeds
        if self.config.nsa_variant == "dense" or (new.shape[1] == 1 and torch.compiler.is_compiling()):
            return None  # compiled decoding steps must not wait for the device
        if input_ids is not None:
            mask = self.token_types(input_ids) > 0
        elif mm_token_type_ids is not None:
            mask = mm_token_type_ids[:, -new.shape[1] :] > 0
        else:
            ids = torch.tensor([self.config.image_token_id, self.config.video_token_id], device=new.device)
            mask = (new[:, :, None] == self.get_input_embeddings()(ids)).all(-1).any(-1)
        return mask if mask.any() else None

    def _drop_cached_features(self, input_ids, past_key_values, kwargs) -> None:
        """Drop the leading images and videos that are in the cache already, so that a later turn of one conversation
        may pass those of all turns (batches must pass the new ones only)."""
        encoded = dict(kwargs.get("mm_encoder_outputs") or {})
        features = (*encoded.values(), kwargs.get("pixel_values"), kwargs.get("pixel_values_videos"))
        if len(input_ids) > 1 or all(x is None for x in features) or int(past_key_values.get_seq_length()) == 0:
            return
        merge = self.config.vision_config.spatial_merge_size**2
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            output, grid = encoded.get(kind), kwargs.get(grids)
            if output is not None:
                sizes = [len(x) for x in output.pooler_output]
            elif kwargs.get(pixels) is not None and grid is not None:
                sizes = [n // merge for n in grid.prod(-1).tolist()]
            else:
                continue
            n_new = int((input_ids == getattr(self.config, f"{kind}_token_id")).sum())
            drop = next((i for i in range(len(sizes) + 1) if sum(sizes[i:]) == n_new), 0)  # 0: stock finds the mistake
            if output is not None:
                encoded[kind] = type(output)(pooler_output=output.pooler_output[drop:]) if drop < len(sizes) else None
            elif drop < len(sizes):
                kwargs[pixels], kwargs[grids] = kwargs[pixels][sum(sizes[:drop]) * merge :], grid[drop:]
            else:
                kwargs[pixels] = kwargs[grids] = None
        if encoded:
            kwargs["mm_encoder_outputs"] = encoded

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        mm_token_type_ids: torch.IntTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Rotary positions by the rule of Qwen2-VL (arXiv 2409.12191 §2.1) and Qwen2.5-VL (arXiv 2502.13923 §2.1.2).

        Text counts up in all three components. The patches of an image or video count their frame, row and column,
        frames in units of 1 / tokens_per_second; each modality starts at the largest position before it plus one.
        (transformers 5.x lets text after a video start too early, and up to 5.17 cuts seconds to integers, as is done
        here with `truncate_seconds`.)

        Args:
            input_ids: [batch, length]; the grids are int [images or videos, 3] in patches, second_per_grid_ts are the
                seconds that a temporal patch of each video spans (default 1) or, of videos whose frames are not evenly
                spaced, [videos, patches or more]: at which each begins, from 0; attention_mask is 0 for padding.

        Returns:
            positions [3, batch, length], and [batch, 1]: what to add to a later token's index for its position.

        Raises:
            ValueError: placeholder tokens and grids do not fit together.
        """
        vision, truncate = self.config.vision_config, self.config.text_config.cuts_seconds()
        merge, tokens_per_second = vision.spatial_merge_size, vision.tokens_per_second
        types = self.token_types(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        grids = {
            kind: iter([] if grid is None else grid.tolist())
            for kind, grid in ((1, image_grid_thw), (2, video_grid_thw))
        }
        seconds = iter([] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist())
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=input_ids.device)
        deltas = []
        for row in range(len(input_ids)):
            keep = slice(None) if attention_mask is None else attention_mask[row].bool().to(input_ids.device)
            kinds, lengths = torch.unique_consecutive(types[row][keep], return_counts=True)
            parts, start = [torch.empty(3, 0, dtype=torch.long)], 0
            for kind, left in zip(kinds.tolist(), lengths.tolist(), strict=True):
                while left > 0:
                    if kind == 0:
                        part = torch.arange(left).expand(3, -1)
                    else:
                        grid = next(grids[kind], None)
                        name = ("image", "video")[kind - 1]
                        if grid is None or grid[0] * grid[1] * grid[2] // merge**2 > left:
                            raise ValueError(
                                f"{name}_grid_thw does not fit the {name} placeholders of sample {row}: {left} tokens "
                                f"are left for {'no further grid' if grid is None else grid}"
                            )
                        t, h, w = (torch.arange(n) for n in (grid[0], grid[1] // merge, grid[2] // merge))
                        if kind == 2:  # whole units; the margin undoes float32 seconds just below their value
                            span = next(seconds, 1.0)
                            if not isinstance(span, list):
                                t = t.double() * span
                            elif len(span) < len(t):
                                raise ValueError(f"second_per_grid_ts has {len(span)} times for {len(t)} patches")
                            else:
                                t = torch.tensor(span[: len(t)], dtype=torch.float64)
                            if truncate:  # spans, or times if they are not evenly spaced
                                t = torch.arange(len(t)) * int(span) if not isinstance(span, list) else t.floor()
                            t = (t * (tokens_per_second * (1 + 1e-7))).floor().long()
                        part = torch.cartesian_prod(t, h, w).T
                    parts.append(part + start)
                    left -= part.shape[1]
                    start = int(parts[-1].max()) + 1
            part = torch.cat(parts, 1)
            positions[:, row, keep] = part.to(positions.device)
            deltas.append([start - part.shape[1]])
        return positions, torch.tensor(deltas, device=positions.device)


class VideoNSAForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """VideoNSA with a language-model head; loads its own, stock Qwen2.5-VL and public VideoNSA checkpoints.

    Called and generates as Qwen2.5-VL does. In addition, `forward(..., output_gates=True)` returns the gates of each
    layer (see `VideoNSAModel.forward`). Samples packed into one row, which never see each other, are told by
    `position_ids` [4, batch, length] without an attention mask: first the text positions, which start anew with each
    sample, then those of `get_rope_index`.
    """

    config: VideoNSAConfig

    def __init__(self, config: VideoNSAConfig):
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = VideoNSAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_rename_saved_keys)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but weights are read from safetensors only: pickles can run code."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    # `wraps` keeps the stock signature, which generate() and Trainer inspect.
    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)
    def forward(self, *args, output_gates: bool = False, **kwargs):
        if not output_gates:
            return super().forward(*args, **kwargs)
        gates = []
        observe = functools.partial(_keep_gates, gates, kwargs.pop("observe", None))
        return _with_gates(super().forward(*args, observe=observe, **kwargs), gates)

    def create_masks_for_generate(self, *, inputs_embeds, attention_mask, **kwargs):
        """Leave the mask of a prefill 2-D also for static caches: no [length, length] mask is needed."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        ids = model_kwargs.get("input_ids", inputs_tensor)
        ids = ids if ids.shape[1] > 0 else inputs_tensor
        if model_kwargs.get("mm_token_type_ids") is None and not ids.is_floating_point():
            model_kwargs = {**model_kwargs, "mm_token_type_ids": self.model.token_types(ids)}
        if any(model_kwargs.get(name) is not None for name in ("image_grid_thw", "video_grid_thw")):
            self.model.rope_deltas = None  # those of an earlier call, which 5.17 would use for a new video
        else:
            cache = model_kwargs.get("past_key_values")
            self.model.rope_deltas = getattr(cache, "rope_deltas", self.model.rope_deltas)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


def _keep_gates(kept: list, observe: Callable | None, attention, q, k, v, gates, layout: VisionLayout):
    """An observer that keeps the gates of a layer as [batch, length, heads, 3], those that another one returns."""
    gates = gates if observe is None else observe(attention, q, k, v, gates, layout)
    every = gates.new_zeros(len(q), *gates.shape[1:]).index_copy(0, layout.queries, gates)
    kept.append(every.unflatten(0, (-1, layout.length)))
    return gates


def _with_gates(outputs, gates: list):
    """Add the gates to a ModelOutput, or to the tuple that stands for one."""
    if isinstance(outputs, tuple):
        return (*outputs, tuple(gates))
    outputs["gates"] = tuple(gates)
    return outputs


def _rename_saved_keys(module, state_dict, prefix, *args):
    """Accept the 4.x key layout of `save_pretrained`: Trainer resumes by a plain, non-strict load_state_dict."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
            name = f"model.language_model.{name.removeprefix('model.')}"
        state_dict[prefix + name] = state_dict.pop(key)


__all__ = ["VideoNSAForConditionalGeneration", "VideoNSAModel", "VideoNSATextModel"]

VideoNSAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
