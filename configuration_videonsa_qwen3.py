"""Configuration of VideoNSA on Qwen3-VL: the fields of `configuration_videonsa.py` on another backbone.

The model is in `modeling_videonsa_qwen3.py`.
"""

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig

from .configuration_videonsa import SparseConfig, SparseTextConfig


class VideoNSAQwen3TextConfig(SparseTextConfig, Qwen3VLTextConfig):
    r"""
    Configuration of the text decoder: that of Qwen3-VL and the fields of [`SparseTextConfig`].

    The variant `"released"`, and the fields that belong to it, are refused: no public checkpoint has it.
    """

    model_type = "videonsa_qwen3_text"
    variants = ("paper", "merged", "dense")


class VideoNSAQwen3Config(SparseConfig, Qwen3VLConfig):
    r"""
    Configuration of VideoNSA on Qwen3-VL, with a [`VideoNSAQwen3TextConfig`] as `text_config`.

    A stock configuration of a dense Qwen3-VL (2B to 32B) loads with the defaults of the fields of Native Sparse
    Attention.
    """

    model_type = "videonsa_qwen3"
    # Both names: transformers up to 5.17 reads the first, later ones the second.
    sub_configs = {"vision_config": Qwen3VLVisionConfig, "text_config": VideoNSAQwen3TextConfig}
    sub_configs_defaults = dict(sub_configs)
    auto_classes = (
        "configuration_videonsa_qwen3.VideoNSAQwen3Config",
        "modeling_videonsa_qwen3.VideoNSAQwen3ForConditionalGeneration",
    )

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: the checkpoint is of another kind, such as Qwen3-VL with a mixture of experts.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        kind = config_dict.get("model_type", cls.model_type)
        if kind not in (cls.model_type, Qwen3VLConfig.model_type):
            raise ValueError(
                f"model_type must be {Qwen3VLConfig.model_type} (dense Qwen3-VL, 2B to 32B; no mixture of experts) or "
                f"{cls.model_type}, got {kind}"
            )
        return {**config_dict, "model_type": cls.model_type}, kwargs


__all__ = ["VideoNSAQwen3Config", "VideoNSAQwen3TextConfig"]

VideoNSAQwen3Config.register_for_auto_class()
