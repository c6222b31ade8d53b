"""VideoNSA on Qwen3-VL (dense, 2B to 32B): the same sparse attention in another backbone.

Only what Qwen3-VL alone has stands here. What backbones share is in `sparse_model.py`, the attention module in
`vision_attention.py`, the fields in `configuration_videonsa_qwen3.py`. What Qwen3-VL does otherwise than Qwen2.5-VL:

- Queries and keys are normalised before the rotary, whose frequencies are interleaved: the stock attention does both
  before it calls ours.
- Features of the vision tower's inner layers (deepstack) are added to the vision tokens after the first layers of the
  decoder, by the stock text model.
- The prompt has the time of each temporal patch as text, so that text stands between the patches of a video. They are
  one stream of vision tokens all the same, and its blocks count vision tokens alone.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextAttention,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextModel,
    Qwen3VLVisionModel,
)

from .configuration_videonsa_qwen3 import VideoNSAQwen3Config, VideoNSAQwen3TextConfig
from .sparse_model import SparseForConditionalGeneration, SparseModel, SparseTextModel
from .transformers_compat import Stock, check_contract, named_arguments
from .vision_attention import SparseAttention
from .vision_layout import send

STOCK = Stock(
    Qwen3VLTextAttention,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextModel,
    Qwen3VLModel,
    Qwen3VLForConditionalGeneration,
    text_arguments=("visual_pos_masks", "deepstack_visual_embeds"),
)
check_contract(STOCK)


class VideoNSAQwen3Attention(SparseAttention, Qwen3VLTextAttention):
    """Attention of a decoder layer of Qwen3-VL, sparse for vision queries."""

    stock_class = Qwen3VLTextAttention
    forward = named_arguments(Qwen3VLTextAttention.forward)(SparseAttention.forward)


class VideoNSAQwen3TextModel(SparseTextModel, Qwen3VLTextModel):
    """The text decoder of Qwen3-VL with `VideoNSAQwen3Attention` in every layer."""

    config: VideoNSAQwen3TextConfig
    stock = STOCK
    attention_class = VideoNSAQwen3Attention

    forward = named_arguments(Qwen3VLTextModel.forward)(SparseTextModel.forward)


class VideoNSAQwen3Model(SparseModel, Qwen3VLModel):
    """Vision tower and text decoder of Qwen3-VL. Numbers positions as the stock class does."""

    config: VideoNSAQwen3Config
    vision_class = Qwen3VLVisionModel
    text_class = VideoNSAQwen3TextModel

    forward = named_arguments(Qwen3VLModel.forward)(SparseModel.forward)
    compute_3d_position_ids = named_arguments(Qwen3VLModel.compute_3d_position_ids)(SparseModel.compute_3d_position_ids)

    def _vision_mask(self, kwargs: dict) -> torch.Tensor | None:
        """As in [`SparseModel`], and a ValueError for embeddings whose features of deepstack are missing."""
        mask = super()._vision_mask(kwargs)
        if mask is not None and not self._has_features(kwargs, embedded=False):
            raise ValueError(
                "inputs_embeds with the features of images or video lack those of deepstack, which Qwen3-VL adds after "
                "its first layers: pass input_ids with pixel_values or pixel_values_videos"
            )
        return mask

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        mm_token_type_ids: torch.IntTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Rotary positions of a batch: those of the stock class, which has them right.

        Text counts up in all three components. Each temporal patch of a video is numbered as an image is: one time, and
        its rows and columns from there. The seconds between patches stand in the text before them.

        Args:
            input_ids: [batch, length]; the grids are int [images or videos, 3] in patches; attention_mask is 0 for
                padding.

        Returns:
            positions [3, batch, length], and [batch, 1]: what to add to a later token's index for its position.

        Raises:
            ValueError: placeholder tokens and grids do not fit together.
        """
        types = self.token_types(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        # On the CPU, since the stock class reads every grid and every run of types. Of the ids it takes the shape only.
        media = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
        types, *given = (x if x is None else x.cpu() for x in (types, *media.values(), attention_mask))
        media = dict(zip((*media, "attention_mask"), given, strict=True))
        self._check_runs(types, **media)
        positions, deltas = super().get_rope_index(types.long(), types, **media)
        return send(positions, input_ids.device), send(deltas, input_ids.device)

    def _check_runs(self, types, image_grid_thw, video_grid_thw, attention_mask) -> None:
        """Raise a ValueError if an image, or a temporal patch of a video, is not one run of as many placeholders."""
        merge = self.config.vision_config.spatial_merge_size**2
        images, videos = ([] if grid is None else grid.tolist() for grid in (image_grid_thw, video_grid_thw))
        runs = {
            1: iter([time * height * width // merge for time, height, width in images]),
            2: iter([height * width // merge for time, height, width in videos for _ in range(time)]),
        }
        for row, kinds in enumerate(types):
            kept = kinds if attention_mask is None else kinds[attention_mask[row].bool()]
            for kind, length in zip(*(x.tolist() for x in kept.unique_consecutive(return_counts=True)), strict=True):
                due = next(runs[kind], None) if kind else length
                if due != length:
                    name = "image" if kind == 1 else "video"
                    raise ValueError(
                        f"{name}_grid_thw does not fit the {name} placeholders of sample {row}: a run has {length}, "
                        f"where {'none is' if due is None else f'{due} are'} due. Text must stand between images, and "
                        "between the temporal patches of a video"
                    )


class VideoNSAQwen3ForConditionalGeneration(SparseForConditionalGeneration, Qwen3VLForConditionalGeneration):
    """VideoNSA on Qwen3-VL with a language-model head; loads its own and stock Qwen3-VL checkpoints.

    Called and generates as Qwen3-VL does, with the additions of [`VideoNSAForConditionalGeneration`].
    """

    config: VideoNSAQwen3Config
    model_class = VideoNSAQwen3Model

    forward = named_arguments(Qwen3VLForConditionalGeneration.forward)(SparseForConditionalGeneration.forward)
    generate = named_arguments(Qwen3VLForConditionalGeneration.generate)(SparseForConditionalGeneration.generate)
    prepare_inputs_for_generation = named_arguments(Qwen3VLForConditionalGeneration.prepare_inputs_for_generation)(
        SparseForConditionalGeneration.prepare_inputs_for_generation
    )

    def shard_sequence(self, mesh: DeviceMesh | None) -> None:
        """Refuse: the features of deepstack are not spread over ranks.

        Raises:
            ValueError: there is a mesh.
        """
        if mesh is not None:
            raise ValueError("shard_sequence needs a Qwen2.5-VL backbone: Qwen3-VL has no sequence parallelism here")


__all__ = ["VideoNSAQwen3ForConditionalGeneration", "VideoNSAQwen3Model", "VideoNSAQwen3TextModel"]

VideoNSAQwen3ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
