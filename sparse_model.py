"""What VideoNSA adds to a vision-language model of transformers, whichever its backbone: which tokens of a call are
vision, where they stand, and what a cache remembers of them.

Each class comes before the class of transformers among the bases of a model: `modeling_videonsa.py` has those of
Qwen2.5-VL, `modeling_videonsa_qwen3.py` those of Qwen3-VL. The attention module is in `vision_attention.py`.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .cache_record import CacheRecord, cached_vision, following_positions, position_after
from .configuration_videonsa import SparseConfig, SparseTextConfig
from .sequence_parallel import check_mesh, forward_with_head, shard_frames, shard_tokens
from .transformers_compat import (
    CACHE,
    Stock,
    WholeCheckpoint,
    cache_of,
    cached_length,
    check_attention,
    check_cache_written,
    check_contract,
)
from .vision_attention import GATE_STD, GateLinear, SparseAttention, only_last_queries, untrained_gates
from .vision_layout import layout_of_call, vision_by_position

logger = logging.get_logger(__name__)


class SparseTextModel(WholeCheckpoint):
    """A text decoder with sparse attention in every layer."""

    stock: Stock
    attention_class: type[SparseAttention]
    _keys_to_ignore_on_load_unexpected = [r"\.g_proj_[12]\."]  # of a checkpoint with gates, which "merged" has not

    def __init__(self, config: SparseTextConfig):
        check_contract(self.stock)
        config.validate_nsa()
        config.validate_variant()
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, i)
        self.layers[-1].register_forward_pre_hook(only_last_queries, with_kwargs=True)
        self.gates_checked = False
        self.sequence_mesh = None  # see SparseForConditionalGeneration.shard_sequence
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, GateLinear):
            init.normal_(module.weight, mean=0.0, std=GATE_STD)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self, vision_mask: torch.Tensor | None = None, observe: Callable | None = None, last: int = 0, **kwargs
    ):
        """As in transformers, with vision_mask bool [batch, length]: which new tokens are vision; None for none.

        With `last`, only the outputs of so many last tokens are read, and the others may be missing.
        """
        if self.config.nsa_variant != "dense":
            check_attention(self.config._attn_implementation, self.config.nsa_variant)
        if vision_mask is not None and self.config.nsa_variant == "released":
            vision_mask = vision_by_position(kwargs.get("position_ids"))
        if torch.compiler.is_compiling() and vision_mask is None and self.sequence_mesh is None:
            return super().forward(**kwargs)

        new = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, length = new.shape[:2]
        cache = kwargs.get(CACHE)
        past = cached_length(cache)
        position_ids, attention_mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if vision_mask is not None or self.sequence_mesh is not None:
            is_vision = new.new_zeros(batch, length, dtype=torch.bool) if vision_mask is None else vision_mask
            vision = torch.cat([cached_vision(cache, past, is_vision), is_vision], 1)
            last = 0 if observe or self._all_are_read(kwargs) else last
            self._cut_after_other_hooks()
            stated = (attention_mask, position_ids)
            kwargs["vision_layout"] = layout_of_call(self.config, vision, past, *stated, observe, last)
            # Of four dimensions, so that it counts as prepared, and no [length, length] mask is made.
            kwargs["attention_mask"] = new.new_empty(1, 1, 1, 1)
        if vision_mask is not None:
            self._warn_of_untrained_gates()
        if self.sequence_mesh is not None:
            shard_tokens(self, past, kwargs)

        outputs = super().forward(**kwargs)

        cache = cache_of(outputs) if cache is None else cache
        if cache is not None:
            check_cache_written(cache, past + length)
            if position_ids is not None:
                valid = None
                if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                    valid = attention_mask[:, -length:].bool()
                following = following_positions(position_ids.expand(*position_ids.shape[:-2], batch, length), valid)
                if vision_mask is None:
                    vision_mask = torch.zeros_like(following, dtype=torch.bool)
                CacheRecord.of(cache).append(past, vision_mask.to(following.device), following)
        return outputs

    def _warn_of_untrained_gates(self) -> None:
        """Log, at the first sparse call of a model that is not being trained, that its gates are as they were made."""
        needs_gates = self.config.nsa_variant in ("paper", "released")
        if self.gates_checked or self.training or not needs_gates or torch.compiler.is_compiling():
            return
        self.gates_checked = True  # once: the check waits for the device
        if untrained_gates([layer.self_attn for layer in self.layers]):
            logger.warning(
                "The gates of this checkpoint are untrained, so that answers about images and videos are noise with "
                f'nsa_variant="{self.config.nsa_variant}". Load it with nsa_variant="dense" for the answers of the '
                'base model, or with nsa_variant="merged" for sparse attention without training, or fine-tune it first'
            )

    def _all_are_read(self, kwargs: dict) -> bool:
        """Whether somebody may read what the last layer computes for any token of a call with vision."""
        wanted = (
            kwargs.get(name, getattr(self.config, name, None)) for name in ("output_hidden_states", "output_attentions")
        )
        recorded = any(x is not None and x is not False for x in wanted)
        hooked = any(module._forward_hooks for module in (self, self.norm, *self.layers[-1].modules()))
        # Deepstack features of Qwen3-VL are added to what a layer returns.
        added = len(kwargs.get("deepstack_visual_embeds") or ()) >= len(self.layers)
        # Text rows of "released" have a term of their own wherever the call has vision queries.
        return self.training or recorded or hooked or added or self.config.nsa_variant == "released"

    def _cut_after_other_hooks(self) -> None:
        """Have hooks that others put before the last layer run before `only_last_queries`, and see all tokens."""
        hooks = self.layers[-1]._forward_pre_hooks
        own = [key for key, hook in hooks.items() if hook is only_last_queries]
        if len(hooks) > len(own) > 0:
            hooks.move_to_end(own[0])


class SparseModel(WholeCheckpoint):
    """Vision tower and text decoder. Finds the vision tokens of a call, and their positions over a cache."""

    vision_class: type[PreTrainedModel]
    text_class: type[SparseTextModel]

    def __init__(self, config: SparseConfig):
        PreTrainedModel.__init__(self, config)  # the stock class would make its own text model
        self.visual = self.vision_class._from_config(config.vision_config)
        self.language_model = self.text_class._from_config(config.text_config)
        self.rope_deltas = None  # of the stock class; each cache knows its own
        self.post_init()

    def forward(self, output_gates: bool = False, observe: Callable | None = None, last: int = 0, **kwargs):
        """As in transformers.

        Vision tokens are told by `input_ids`; where only `inputs_embeds` are given, by `mm_token_type_ids`, which are
        needed once image and video features stand in them.

        Args:
            output_gates: also return `gates`, per layer [batch, length, heads, 3] in the order compression, selection,
                window, 0 for tokens that are not vision; empty when the call computes no sparse attention with gates.
            observe: called in each layer that has vision queries, before it attends, with its attention module, q
                [batch * length, heads, dim], k and v [batch, KV heads, total, dim] of all tokens after the rotary, the
                gates of its vision queries [N, heads, 3], and the `VisionLayout`; returns the gates to use. In the
                variant "merged", which has none, the gates are None.
            last: if not 0, `last_hidden_state` is read at so many last tokens only, and may lack the others.
        """
        gates = []
        if output_gates:
            observe = functools.partial(_keep_gates, gates, observe)
        input_ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE)
        if input_ids is not None and cache is not None:
            self.drop_cached_features(input_ids, cache, kwargs)
        vision_mask = self._vision_mask(kwargs)
        if self.config.nsa_variant != "dense":  # before the vision tower, which a foreign function may break
            check_attention(self.config.text_config._attn_implementation, self.config.nsa_variant)
        if kwargs.get("mm_token_type_ids") is None and input_ids is not None and self._has_features(kwargs):
            kwargs["mm_token_type_ids"] = self.token_types(input_ids)  # without it, positions would be those of text
        last = 0 if self._forward_hooks else last
        outputs = super().forward(vision_mask=vision_mask, observe=observe, last=last, **kwargs)
        return _with_gates(outputs, gates) if output_gates else outputs

    def compute_3d_position_ids(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        **kwargs,
    ) -> torch.LongTensor | None:
        """Rotary positions of the new tokens of a call that does not give them, int64 [3, batch, length]; None for
        those of text alone.

        Raises:
            ValueError: images or videos come without their grids, or over a cache.
        """
        batch, length = inputs_embeds.shape[:2]
        cache = kwargs.pop(CACHE, None)
        past = 0 if cache is None else cache.get_seq_length()
        new_types = None if mm_token_type_ids is None else mm_token_type_ids[:, -length:]
        if past > 0:
            if new_types is not None and new_types.any():
                raise ValueError(
                    "images and videos over a cache need position_ids: get_rope_index of the whole sequence"
                )
            position = position_after(cache, int(past))
            if position is None:
                return None
            position = position.to(inputs_embeds.device)[:, None]
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                valid = attention_mask[:, -length:].long()
                position = position + (valid.cumsum(1) - valid) * valid
            else:
                position = position + torch.arange(length, device=position.device)
            return position.expand(3, batch, length)

        if all(kwargs.get(grids) is None for grids in ("image_grid_thw", "video_grid_thw")):
            if new_types is not None and new_types.any():
                raise ValueError(
                    "images and videos need position_ids, or image_grid_thw and video_grid_thw to compute them from"
                )
            return None
        if mm_token_type_ids is None:
            raise ValueError(
                "inputs_embeds with image_grid_thw or video_grid_thw need mm_token_type_ids or position_ids"
            )
        ids = mm_token_type_ids if input_ids is None else input_ids
        positions, _ = self.get_rope_index(
            ids, mm_token_type_ids=mm_token_type_ids, attention_mask=attention_mask, **kwargs
        )
        return positions

    def token_types(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Modality of each token: 0 text, 1 image, 2 video."""
        return (input_ids == self.config.image_token_id).int() + 2 * (input_ids == self.config.video_token_id).int()

    def _vision_mask(self, kwargs: dict) -> torch.Tensor | None:
        """bool [batch, length], which new tokens of a call are vision; None if none is, or the variant is dense.

        A token is vision because a feature stands there. A placeholder that the model generated itself is text.

        Raises:
            ValueError: the features of placeholders are missing, the types do not fit the embeddings, or nothing tells
                whether embeddings are of images or video.
        """
        config = self.config
        config.text_config.validate_variant()
        input_ids, embeds, types = (kwargs.get(x) for x in ("input_ids", "inputs_embeds", "mm_token_type_ids"))
        length = (embeds if input_ids is None else input_ids).shape[1]
        if length == 1 and torch.compiler.is_compiling():
            return None  # compiled decoding steps must not wait for the device
        cache = kwargs.get(CACHE)
        past = cached_length(cache)

        if input_ids is not None:
            mask = self.token_types(input_ids) > 0
            if not self._has_features(kwargs):
                if past > 0 and (types is None or length == 1):
                    return None  # text, as in each step of decoding, which must not wait for the device
                expected = types[:, -length:].to(mask.device) > 0 if types is not None else mask
                if expected.any():
                    raise ValueError(
                        f"input_ids have {int(expected.sum())} placeholders of images or video, but the call has "
                        "neither pixel_values nor pixel_values_videos: pass what the processor returned with the ids"
                    )
                return None
        elif types is not None:
            if types.shape[1] not in (length, past + length):
                raise ValueError(
                    f"mm_token_type_ids must have a type for each of the {length} embeddings, got {list(types.shape)}"
                )
            mask = types[:, -length:] > 0
        elif config.nsa_variant == "dense" or (length == 1 and past > 0):
            return None
        else:
            ids = torch.tensor([config.image_token_id, config.video_token_id], device=embeds.device)
            mask = (embeds[:, :, None] == self.get_input_embeddings()(ids)).all(-1).any(-1)
            if not mask.any():
                # Features may stand in them already, which look like no embedding.
                raise ValueError(
                    "inputs_embeds alone do not tell which tokens are vision, which nsa_variant="
                    f"{config.nsa_variant!r} has to know: pass input_ids too, or mm_token_type_ids [batch, length] "
                    '(0 text, 1 image, 2 video; all 0 for text alone), or load the model with nsa_variant="dense"'
                )
        return mask if config.nsa_variant != "dense" and mask.any() else None

    @staticmethod
    def _has_features(kwargs: dict, embedded: bool = True) -> bool:
        """Whether a call brings features for placeholders or, with `embedded`, embeddings that may have them."""
        encoded = (kwargs.get("mm_encoder_outputs") or {}).values()
        names = ("pixel_values", "pixel_values_videos", *(("inputs_embeds",) if embedded else ()))
        return any(x is not None for x in (*encoded, *(kwargs.get(name) for name in names)))

    def drop_cached_features(self, input_ids, past_key_values, kwargs) -> None:
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
                encoded[kind] = _features_from(output, drop) if drop < len(sizes) else None
            elif drop < len(sizes):
                kwargs[pixels], kwargs[grids] = kwargs[pixels][sum(sizes[:drop]) * merge :], grid[drop:]
            else:
                kwargs[pixels] = kwargs[grids] = None
        if encoded:
            kwargs["mm_encoder_outputs"] = encoded


class SparseForConditionalGeneration(WholeCheckpoint):
    """The model with a language-model head."""

    model_class: type[SparseModel]

    def __init__(self, config: SparseConfig):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(self, output_gates: bool = False, observe: Callable | None = None, **kwargs):
        """As in transformers, and with `output_gates` and `observe` as in [`SparseModel.forward`]."""
        gates = []
        if output_gates:
            observe = functools.partial(_keep_gates, gates, observe)
        if observe is not None:
            kwargs["observe"] = observe
        mesh = self.model.language_model.sequence_mesh
        read = kwargs.get("logits_to_keep")
        if mesh is None and isinstance(read, int) and read > 0 and kwargs.get("labels") is None:
            kwargs["last"] = read
        outputs = super().forward(**kwargs) if mesh is None else forward_with_head(super().forward, mesh, kwargs)
        return _with_gates(outputs, gates) if output_gates else outputs

    def shard_sequence(self, mesh: DeviceMesh | None) -> None:
        """Spread the frames and tokens of each call over the ranks of `mesh`, of one dimension; None ends it.

        Every rank makes the same calls with the same inputs, and gets the loss, logits and generated tokens that one
        process gets: see `sequence_parallel.py`.

        Raises:
            ValueError: the ranks and the KV heads do not fit, or the variant has no sequence parallelism.
        """
        if mesh is not None:
            check_mesh(mesh, self.config.text_config)
        shard_frames(self.model.visual, mesh)
        self.model.language_model.sequence_mesh = mesh

    def generate(self, **kwargs):
        """As in transformers, with a cache by either of its names."""
        return super().generate(**kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """As in transformers. In chunks, it would give new image and video tokens the features of cached ones.

        Raises:
            ValueError: the features are neither those of the new tokens nor those of all tokens.
        """
        cache = model_kwargs.get(CACHE)
        in_chunks = is_first_iteration and generation_config.prefill_chunk_size is not None
        past = cached_length(cache) if in_chunks else 0
        if past > 0:
            # The mask is of all tokens. Where it hides none, transformers keeps its length alone.
            mask = model_kwargs.get("attention_mask")
            length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            new = input_ids[:, past:] if length == input_ids.shape[1] else input_ids
            self.model.drop_cached_features(new, cache, model_kwargs)
            for kind, output in (model_kwargs.get("mm_encoder_outputs") or {}).items():
                count = 0 if output is None else sum(map(len, output.pooler_output))
                places = int((new == getattr(self.config, f"{kind}_token_id")).sum())
                if count != places:
                    raise ValueError(
                        f"{kind} features and {kind} tokens do not match: {count} features for {places} new tokens "
                        "over a cache, with prefill_chunk_size. A batch must pass new images and videos only"
                    )
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=is_first_iteration)

    def prepare_inputs_for_generation(self, is_first_iteration: bool = False, **kwargs):
        """As in transformers, which forgets to give an assistant model the images and videos of the prompt."""
        cache = kwargs.get(CACHE)
        past = None if cache is None else cache.get_seq_length()
        empty = isinstance(past, int) and past == 0  # a tensor is of a static cache, which assistants do not have
        return super().prepare_inputs_for_generation(is_first_iteration=is_first_iteration or empty, **kwargs)

    def create_masks_for_generate(self, *, inputs_embeds, attention_mask, **kwargs):
        """Leave the mask of a prefill 2-D also for static caches: no [length, length] mask is needed."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Positions of a whole sequence: those in the text and, below them, the rotary ones."""
        text = GenerationMixin._prepare_position_ids_for_generation(
            self, inputs_tensor, model_kwargs
        )  # [batch or 1, cached and new tokens]
        ids = model_kwargs.get("input_ids", inputs_tensor)
        ids = ids if ids.shape[1] > 0 else inputs_tensor
        types, cache = model_kwargs.get("mm_token_type_ids"), model_kwargs.get(CACHE)
        if types is None and not ids.is_floating_point():
            types = self.model.token_types(ids)
        past = cached_length(cache)

        grids = any(model_kwargs.get(name) is not None for name in ("image_grid_thw", "video_grid_thw"))
        position = position_after(cache, past)
        # Without a grid, a placeholder among the new tokens is one that the model generated.
        if position is not None and (types is None or not grids or not types[:, past:].any()):
            mask = model_kwargs.get("attention_mask")
            seen = past if mask is None else mask[:, :past].sum(1)
            return text[None] + (position.to(text.device) - seen)[None, :, None]

        if types is None or not grids:
            return text.expand(4, *text.shape)
        options = {name: x for name, x in model_kwargs.items() if name not in ("input_ids", "mm_token_type_ids")}
        ids = types if ids.is_floating_point() else ids
        rotary, _ = self.model.get_rope_index(ids, mm_token_type_ids=types, **options)
        return torch.cat([text.expand(1, *rotary.shape[1:]), rotary])


def _keep_gates(kept: list, observe: Callable | None, attention, q, k, v, gates, layout):
    """An observer that keeps the gates of a layer as [batch, length, heads, 3], those that another one returns."""
    gates = gates if observe is None else observe(attention, q, k, v, gates, layout)
    if gates is None:
        return None
    every = gates.new_zeros(len(q), *gates.shape[1:]).index_copy(0, layout.queries, gates)
    kept.append(every.unflatten(0, (-1, layout.length)))
    return gates


def _with_gates(outputs, gates: list):
    """Add the gates to a ModelOutput, or to the tuple that stands for one."""
    if isinstance(outputs, tuple):
        return (*outputs, tuple(gates))
    outputs["gates"] = tuple(gates)
    return outputs


def _features_from(output, drop: int):
    """The output of a vision tower for a list of images or videos without the first `drop` of them."""
    kept = {"pooler_output": output.pooler_output[drop:]}
    if "deepstack_features" in output:  # of Qwen3-VL: for each of its layers, those of all images or videos
        kept["deepstack_features"] = [features[drop:] for features in output.deepstack_features]
    return type(output)(**kept)
