"""Configuration of VideoNSA: Qwen2.5-VL's, plus what the sparse attention of vision tokens needs.

The new fields belong to the text decoder (`SparseTextConfig`). The whole configuration (`SparseConfig`) reads and
writes them too, so that `AutoModel.from_pretrained(repo, nsa_variant="dense", trust_remote_code=True)` works. The model
is in `modeling_videonsa.py`; Qwen3-VL gets the same fields in `configuration_videonsa_qwen3.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

NSA_VARIANTS = ("paper", "released", "merged", "dense")
NSA_BACKENDS = ("auto", "triton", "torch")


@dataclass(repr=False, kw_only=True)
class SparseTextConfig:
    r"""
    The fields of Native Sparse Attention (arXiv 2510.02295) in the configuration of a text decoder.

    Comes before the class of transformers among the bases of a configuration.

    Args:
        block_size (`int`, defaults to 64): Vision tokens per block, a power of two of at least 16.
        block_count (`int`, defaults to 32): Blocks that a vision query selects, at least 3 (the first, the previous and
            its own are always chosen). The public checkpoint's name for it, `block_counts`, is understood.
        block_spread (`bool`, defaults to `True`): `"merged"` estimates the attention to a block from the means and the
            variances of its keys' channels, otherwise from the means alone as the paper does.
        block_per_head (`bool`, defaults to `False`): In `"merged"` each query head chooses blocks for itself, and not
            together with the others of its KV head: closer to dense attention, and slower.
        block_remainder (`bool`, defaults to `False`): `"merged"` lets blocks that are not chosen enter by the means of
            their keys and values.
        window_size (`int`, defaults to 256): Vision tokens in the sliding window; `"merged"` always chooses the blocks
            that it overlaps.
        gate_temperature (`float`, defaults to 1.0): What the logits of the gates are divided by; 0.3 for checkpoints in
            the layout of the public one.
        nsa_variant (`str`, defaults to `"paper"`): What vision queries compute: `"paper"` the published method,
            `"released"` what the code computes that the public checkpoint was trained with (the default for
            checkpoints in its layout; see docs/released.md), `"merged"` one softmax over the earlier text and the
            chosen blocks, for stock weights (no gates; see docs/merged.md), `"dense"` stock attention.
        truncate_seconds (`bool`, *optional*): Cut the seconds per temporal patch to an integer before they become
            positions, as the public code does. By default only the variant `"released"` does.
        block_causal (`bool`, defaults to `False`): In the variant `"released"`, queries see pooled blocks up to their
            own, as in an intermediate version of the public code, and not those from their own on.
        nsa_backend (`str`, defaults to `"auto"`): `"triton"`, `"torch"`, or `"auto"`: what `nsa_triton.available` says.

    Raises:
        ValueError: A field has a value outside of what is said above, the query heads are not a multiple of the KV
            heads, or a layer has sliding-window attention (it drops keys that text queries must see).
    """

    attribute_map = {"block_counts": "block_count"}
    variants: ClassVar[tuple[str, ...]] = NSA_VARIANTS

    block_size: int = 64
    block_count: int = 32
    block_spread: bool = True
    block_per_head: bool = False
    block_remainder: bool = False
    window_size: int = 256
    gate_temperature: float = 1.0
    nsa_variant: str = "paper"
    truncate_seconds: bool | None = None
    block_causal: bool = False
    nsa_backend: str = "auto"

    def __post_init__(self, **kwargs):
        _refuse_removed(kwargs)
        super().__post_init__(**kwargs)
        self.model_type = type(self).model_type  # a stock configuration brings its own
        self.validate_nsa()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "nsa_variant":
            # Set on purpose: a model is saved with it.
            vars(self).pop("_checkpoint_variant", None)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return _with_checkpoint_variant(super().from_dict, config_dict, kwargs)

    def to_dict(self):
        output = super().to_dict()
        output.pop("_checkpoint_variant", None)
        return output

    def checkpoint_variant(self) -> str:
        """The variant that a model is saved with: the checkpoint's own if `nsa_variant` is an option of loading.

        A model without gates ("merged") can be no other. A stock checkpoint has no variant of its own.
        """
        return vars(self).get("_checkpoint_variant", self.nsa_variant)

    def validate_nsa(self):
        """Check the fields above; runs when a configuration is made or loaded, and when a model is made of it."""
        for name, allowed in (("nsa_variant", self.variants), ("nsa_backend", NSA_BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name, least in (("block_size", 16), ("block_count", 3), ("window_size", 1)):
            value = getattr(self, name)
            if not _is_count(value, least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("block_spread", "block_per_head", "block_remainder", "block_causal"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}")
        if not isinstance(self.gate_temperature, int | float) or not self.gate_temperature > 0:
            raise ValueError(f"gate_temperature must be a positive number, got {self.gate_temperature!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.truncate_seconds not in (None, True, False):
            raise ValueError(f"truncate_seconds must be True, False or None, got {self.truncate_seconds!r}")
        layer_types = getattr(self, "layer_types", None) or ()
        if "sliding_attention" in layer_types:
            raise ValueError(
                "layer_types must not contain 'sliding_attention' (use_sliding_window=False): VideoNSA's text queries "
                f"see all earlier tokens; got {layer_types}"
            )
        if "released" not in self.variants and (self.truncate_seconds or self.block_causal):
            raise ValueError(
                "truncate_seconds and block_causal belong to nsa_variant='released', which this backbone does not "
                f"have; got {self.truncate_seconds} and {self.block_causal}"
            )

    def cuts_seconds(self) -> bool:
        """Whether positions are made of whole seconds per temporal patch."""
        return self.nsa_variant == "released" if self.truncate_seconds is None else self.truncate_seconds

    def validate_variant(self) -> None:
        """Raise a ValueError where the fields do not fit the variant (they may be set one after another)."""
        most = 16 * self.num_key_value_heads
        if self.nsa_variant == "released" and not most - 16 < 2 * self.num_attention_heads <= most:
            raise ValueError(
                "nsa_variant='released' takes each head twice and pads them to 16 per KV head: num_attention_heads "
                f"must be in {most // 2 - 7} ... {most // 2} for num_key_value_heads={self.num_key_value_heads}, got "
                f"{self.num_attention_heads}"
            )
        least = 3 + (self.window_size - 2) // self.block_size  # see nsa_checks.check_block_count
        if self.nsa_variant == "merged" and self.block_count < least:
            raise ValueError(
                f'block_count must be at least {least} for nsa_variant="merged": block 0 and those that a window of '
                f"{self.window_size} overlaps are always chosen; got {self.block_count}"
            )

    def attention_budget(self, n_tokens: int, pooled_keys: bool = False) -> float:
        """Share of the n·(n + 1) / 2 query–key pairs of dense causal attention that vision queries compute.

        Counted as in the paper, which takes the own block for a whole one: a query at index i reads up to
        min(i + 1, block_count·block_size) selected keys and min(i + 1, window_size) keys of the window. At 128,000
        tokens that is 3.6 % (5.1 % with the pooled keys; 3.5 % without the keys of the own block that are yet to
        come). Streams shorter than the selection exceed 100 %, since selection and window each read all of them.
        "released" computes every query head twice, over two KV heads.
        The variant "merged" reads the window as part of the selection; text is not counted.

        Args:
            n_tokens: length of the vision stream in tokens, at least 1.
            pooled_keys: also count the (i + 1) // block_size pooled keys of the compression branch.

        Raises:
            ValueError: n_tokens is below 1, or the fields do not fit the variant.
        """
        if n_tokens < 1:
            raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
        self.validate_variant()
        if self.nsa_variant == "dense":
            return 1.0

        def pairs(most):  # sum over i of min(i + 1, most)
            ramp = min(n_tokens, most)
            return ramp * (ramp + 1) // 2 + (n_tokens - ramp) * most

        complete, rest = divmod(n_tokens, self.block_size)
        before = complete * (complete - 1) // 2 * self.block_size + complete * rest  # sum over i of i // block_size

        released = self.nsa_variant == "released"
        computed = pairs(self.block_count * self.block_size)
        if self.nsa_variant != "merged":
            computed += pairs(self.window_size)
        if pooled_keys and not released:
            computed += before + complete  # sum over i of (i + 1) // block_size
        elif pooled_keys:
            computed += before + n_tokens if self.block_causal else n_tokens * (complete + (rest > 0)) - before
        return (2 if released else 1) * computed / pairs(n_tokens)


class VideoNSATextConfig(SparseTextConfig, Qwen2_5_VLTextConfig):
    r"""Configuration of the text decoder: that of Qwen2.5-VL and the fields of [`SparseTextConfig`]."""

    model_type = "videonsa_text"
    base_model_tp_plan = {**Qwen2_5_VLTextConfig.base_model_tp_plan, "layers.*.self_attn.g_proj_2": "colwise"}


NSA_FIELDS = (
    "block_size",
    "block_count",
    "block_spread",
    "block_per_head",
    "block_remainder",
    "window_size",
    "gate_temperature",
    "nsa_variant",
    "truncate_seconds",
    "block_causal",
    "nsa_backend",
)


def _with_checkpoint_variant(from_dict, config_dict: dict, options: dict):
    """What `from_dict` makes of the dict of a checkpoint and options of loading, with the variant that the dict has if
    the options have another."""
    own = {**config_dict, **(config_dict.get("text_config") or {})}.get("nsa_variant")
    given = options.get("nsa_variant")
    made = from_dict(config_dict, **options)

    if own is not None and given not in (None, own, "merged"):
        config = made[0] if isinstance(made, tuple) else made
        getattr(config, "text_config", config)._checkpoint_variant = own
    return made


def _refuse_removed(kwargs: dict) -> None:
    """Drop a field that saved configurations have, and that no longer does anything, if it did nothing."""
    mass = kwargs.pop("block_mass", 1.0)
    if mass != 1.0:
        raise ValueError(f"block_mass has been removed, set block_count instead; got {mass!r}")


def _is_count(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_public(config: dict) -> bool:
    """Whether a config.json is that of the public VideoNSA checkpoint or one like it, whose authors' code names its
    class as we do, and its type as stock Qwen2.5-VL."""
    return config.get("model_type") == Qwen2_5_VLConfig.model_type and any(
        "VideoNSA" in name for name in config.get("architectures") or ()
    )


def _text_field(name):
    def set_field(self, value):
        before = getattr(self.text_config, name)
        setattr(self.text_config, name, value)
        try:
            self.text_config.validate_nsa()
        except ValueError:
            setattr(self.text_config, name, before)
            raise

    return property(lambda self: getattr(self.text_config, name), set_field, doc=f"`text_config.{name}`")


class SparseConfig:
    """The fields of [`SparseTextConfig`] in the configuration of a whole model, whose `text_config` is one.

    They may be given, read and set here as well as on `text_config`, which is where they are saved. Comes before the
    class of transformers among the bases of a configuration.
    """

    attribute_map = {"block_counts": "block_count"}
    # Files and classes that load a checkpoint, of the configuration and of the model.
    auto_classes: ClassVar[tuple[str, str]]

    def __post_init__(self, **kwargs):
        _refuse_removed(kwargs)
        nsa = {name: kwargs.pop(name) for name in (*NSA_FIELDS, *self.attribute_map) if name in kwargs}
        super().__post_init__(**kwargs)
        self.model_type = type(self).model_type
        for name, value in nsa.items():
            setattr(self, name, value)
        config_class, model_class = self.auto_classes
        models = dict.fromkeys(("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"), model_class)
        self.auto_map = {"AutoConfig": config_class, **models, **(getattr(self, "auto_map", None) or {})}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return _with_checkpoint_variant(super().from_dict, config_dict, kwargs)

    def attention_budget(self, n_tokens: int, pooled_keys: bool = False) -> float:
        """See [`SparseTextConfig.attention_budget`]."""
        return self.text_config.attention_budget(n_tokens, pooled_keys)


for _name in NSA_FIELDS:  # as properties, not as dataclass fields: they are saved once, in text_config
    setattr(SparseConfig, _name, _text_field(_name))


class VideoNSAConfig(SparseConfig, Qwen2_5_VLConfig):
    r"""
    Configuration of VideoNSA: that of Qwen2.5-VL with a [`VideoNSATextConfig`] as `text_config`.

    A stock Qwen2.5-VL configuration loads with the defaults of the fields of Native Sparse Attention.
    """

    model_type = "videonsa"
    # Both names: transformers up to 5.17 reads the first, later ones the second.
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": VideoNSATextConfig}
    sub_configs_defaults = dict(sub_configs)
    auto_classes = ("configuration_videonsa.VideoNSAConfig", "modeling_videonsa.VideoNSAForConditionalGeneration")

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: the checkpoint is of another backbone.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if is_public(config_dict):
            legacy = ("block_counts", "window_size")  # may be null, for the default
            config_dict = {k: v for k, v in config_dict.items() if k not in legacy or v is not None}
            config_dict = {"nsa_variant": "released", "gate_temperature": 0.3, **config_dict}
        kind = config_dict.get("model_type")
        if str(kind).startswith(("qwen3_vl", "videonsa_qwen3")):
            raise ValueError(
                f"model_type must be {cls.model_type} or {Qwen2_5_VLConfig.model_type}, got {kind}: "
                "load it by AutoModel or videonsa.model_class(model_type)"
            )
        if kind == Qwen2_5_VLConfig.model_type:
            config_dict["model_type"] = cls.model_type  # meant to load; the warning about other types would mislead
        return config_dict, kwargs


__all__ = ["VideoNSAConfig", "VideoNSATextConfig"]

VideoNSAConfig.register_for_auto_class()
