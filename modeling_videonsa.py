"""VideoNSA: Qwen2.5-VL whose vision tokens attend through Native Sparse Attention (arXiv 2510.02295).

Only what Qwen2.5-VL alone has stands here: its positions, and the names of its weights. What it shares with other
backbones is in `sparse_model.py`, the attention module in `vision_attention.py`, the fields in
`configuration_videonsa.py`.
"""

import re

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLAttention,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)

from .configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from .rope_positions import Media, sample_positions
from .sparse_model import SparseForConditionalGeneration, SparseModel, SparseTextModel
from .transformers_compat import Stock, check_contract, named_arguments, register_key_layouts
from .vision_attention import SparseAttention
from .vision_layout import send

STOCK = Stock(
    Qwen2_5_VLAttention,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLTextModel,
    Qwen2_5_VLModel,
    Qwen2_5_VLForConditionalGeneration,
    media_arguments=("second_per_grid_ts",),
)
check_contract(STOCK)
register_key_layouts("VideoNSAForConditionalGeneration", "VideoNSAModel")


class VideoNSAAttention(SparseAttention, Qwen2_5_VLAttention):
    """Attention of a decoder layer of Qwen2.5-VL, sparse for vision queries."""

    stock_class = Qwen2_5_VLAttention
    forward = named_arguments(Qwen2_5_VLAttention.forward)(SparseAttention.forward)


class VideoNSATextModel(SparseTextModel, Qwen2_5_VLTextModel):
    """The text decoder of Qwen2.5-VL with `VideoNSAAttention` in every layer."""

    config: VideoNSATextConfig
    stock = STOCK
    attention_class = VideoNSAAttention

    forward = named_arguments(Qwen2_5_VLTextModel.forward)(SparseTextModel.forward)


class VideoNSAModel(SparseModel, Qwen2_5_VLModel):
    """Vision tower and text decoder of Qwen2.5-VL. Numbers positions as Qwen2-VL does."""

    config: VideoNSAConfig
    vision_class = Qwen2_5_VisionTransformerPretrainedModel
    text_class = VideoNSATextModel

    forward = named_arguments(Qwen2_5_VLModel.forward)(SparseModel.forward)
    compute_3d_position_ids = named_arguments(Qwen2_5_VLModel.compute_3d_position_ids)(
        SparseModel.compute_3d_position_ids
    )

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
        """Rotary positions of a batch: see `rope_positions.py`.

        Args:
            input_ids: [batch, length]; the grids are int [images or videos, 3] in patches, second_per_grid_ts are the
                seconds that a temporal patch of each video spans (default 1) or, of videos whose frames are not evenly
                spaced, [videos, patches or more]: at which each begins, from 0; attention_mask is 0 for padding.

        Returns:
            positions [3, batch, length], and [batch, 1]: what to add to a later token's index for its position.

        Raises:
            ValueError: placeholder tokens and grids do not fit together.
        """
        media = Media.of(
            image_grid_thw,
            video_grid_thw,
            second_per_grid_ts,
            merge=self.config.vision_config.spatial_merge_size,
            tokens_per_second=self.config.vision_config.tokens_per_second,
            truncate=self.config.text_config.cuts_seconds(),
        )
        # On the CPU, since every step reads results of the one before.
        types = (self.token_types(input_ids) if mm_token_type_ids is None else mm_token_type_ids).cpu()
        valid = None if attention_mask is None else attention_mask.bool().cpu()
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
        deltas = []
        for row in range(len(input_ids)):
            keep = slice(None) if valid is None else valid[row]
            own, following = sample_positions(types[row][keep], media, row)
            positions[:, row, keep] = own
            deltas.append([following - own.shape[1]])
        return send(positions, input_ids.device), send(torch.tensor(deltas), input_ids.device)


class VideoNSAForConditionalGeneration(SparseForConditionalGeneration, Qwen2_5_VLForConditionalGeneration):
    """VideoNSA with a language-model head; loads its own, stock Qwen2.5-VL and public VideoNSA checkpoints.

    Called and generates as Qwen2.5-VL does. In addition, `forward(..., output_gates=True)` returns the gates of each
    layer (see `SparseModel.forward`). Samples packed into one row, which never see each other, are told by
    `position_ids` [4, batch, length] without an attention mask: first the text positions, which start anew with each
    sample, then those of `get_rope_index`.
    """

    config: VideoNSAConfig
    model_class = VideoNSAModel

    forward = named_arguments(Qwen2_5_VLForConditionalGeneration.forward)(SparseForConditionalGeneration.forward)
    generate = named_arguments(Qwen2_5_VLForConditionalGeneration.generate)(SparseForConditionalGeneration.generate)
    prepare_inputs_for_generation = named_arguments(Qwen2_5_VLForConditionalGeneration.prepare_inputs_for_generation)(
        SparseForConditionalGeneration.prepare_inputs_for_generation
    )

    def __init__(self, config: VideoNSAConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_rename_saved_keys)


def _rename_saved_keys(module, state_dict, prefix, *args):
    """Accept the 4.x key layout of `save_pretrained`: Trainer resumes by a plain, non-strict load_state_dict."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = re.sub(r"^model(\.model)+\.", "model.", key[len(prefix) :])
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
            name = f"model.language_model.{name.removeprefix('model.')}"
        state_dict[prefix + name] = state_dict.pop(key)


__all__ = ["VideoNSAForConditionalGeneration", "VideoNSAModel", "VideoNSATextModel"]

VideoNSAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
