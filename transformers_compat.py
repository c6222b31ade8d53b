"""The seam between VideoNSA and transformers: the only file that knows what a version calls things.

transformers 5.24 renamed the argument `past_key_values` of every forward to `cache`. It translates the old name for
callers, but not for a remote class whose own forward still says `past_key_values`: the cache is then never written,
and decoding sees no video. So our overrides read their arguments by name through `named_arguments`, which knows both
names, and `check_contract` refuses a transformers whose methods are not those that we build on.
"""

import functools
import inspect
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from transformers import Cache, GenerationConfig
from transformers import __version__ as VERSION
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The first and the last minor version of transformers that the test suite runs on.
TESTED = ("5.17", "5.24")

CACHE_NAMES = ("cache", "past_key_values")

# What transformers computes text rows and decoding with. Another name belongs to a serving engine, whose own attention
# would stand in for the sparse one.
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# transformers takes these from the Hub where the package flash-attn is not installed.
HUB_ATTENTION = ("kernels-community/flash-attn", "kernels-community/vllm-flash-attn")


def _parameters(function) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# What this transformers calls the cache. A name that is neither is found by `check_contract`.
CACHE = next((name for name in CACHE_NAMES if name in _parameters(create_masks_for_generate)), CACHE_NAMES[0])


@dataclass(frozen=True)
class Stock:
    """The classes of a backbone in transformers, from which ours derive, and the arguments that it alone has."""

    attention: type
    layer: type
    text_model: type
    model: type
    with_head: type
    text_arguments: tuple[str, ...] = ()
    media_arguments: tuple[str, ...] = ()


def check_contract(stock: Stock) -> None:
    """Check that transformers' methods have the parameters that VideoNSA passes, reads or overrides.

    Warns once about a version newer than the tested ones that keeps the contract.

    Raises:
        ImportError: a method or a parameter is missing; names the version, what is missing and the tested range.
    """
    text = ("attention_mask", "position_ids", CACHE, "inputs_embeds")
    grids = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", *stock.media_arguments)
    pixels = ("pixel_values", "pixel_values_videos")
    needed = {
        (stock.attention, "forward"): ("hidden_states", CACHE, "position_embeddings", "attention_mask", "kwargs"),
        (stock.layer, "forward"): ("hidden_states", CACHE, "position_embeddings", "kwargs"),
        (stock.text_model, "forward"): (*text, "use_cache", *stock.text_arguments, "kwargs"),
        (stock.model, "forward"): ("input_ids", *text, *pixels, *grids, "kwargs"),
        (stock.model, "compute_3d_position_ids"): ("inputs_embeds", CACHE, "mm_token_type_ids"),
        (stock.model, "get_rope_index"): ("input_ids", "attention_mask", *grids),
        (stock.with_head, "forward"): ("input_ids", *text, *pixels, *grids, "kwargs"),
        (stock.with_head, "_prepare_position_ids_for_generation"): ("inputs_tensor", "model_kwargs"),
        (stock.with_head, "generate"): ("inputs", "kwargs"),
        (stock.with_head, "_prefill"): ("input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
    }
    missing = [
        f"{owner.__name__}.{name}({parameter})"
        for (owner, name), parameters in needed.items()
        for parameter in parameters
        if parameter not in _parameters(getattr(owner, name, lambda: None))
    ]
    missing += [
        f"create_masks_for_generate({parameter})"
        for parameter in ("inputs_embeds", "attention_mask")
        if parameter not in _parameters(create_masks_for_generate)
    ]

    oldest, newest = TESTED
    too_old = _minor(VERSION) < _minor(oldest)
    if missing or too_old:
        what = "is too old" if too_old else f"lacks what VideoNSA builds on: {', '.join(missing)}"
        raise ImportError(
            f"transformers {VERSION} {what}. VideoNSA is tested with transformers {oldest} to {newest}: install one of "
            "these, or look for newer code files of the checkpoint"
        )
    if _minor(VERSION) > _minor(newest):
        logger.warning_once(
            f"transformers {VERSION} is newer than the versions that VideoNSA is tested with ({oldest} to {newest}). "
            "Its interface looks the same; compare some answers before you rely on it"
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def named_arguments(stock):
    """Decorate an override of the method `stock`: its arguments reach it by name.

    Positional arguments get the names of `stock`, and the cache gets the name of this version, `CACHE`, by whichever
    name the caller passed it. The override keeps the signature of `stock` for those who inspect it, such as
    `generate` and `Trainer`.

    Raises:
        ValueError: the call names the cache twice.
    """
    names = _parameters(stock)[1:]
    other = next(name for name in CACHE_NAMES if name != CACHE)

    def decorate(override):
        @functools.wraps(override)
        def method(self, *args, **kwargs):
            kwargs.update(zip(names, args, strict=False))
            if other in kwargs:
                cache = kwargs.pop(other)
                if cache is not None and kwargs.get(CACHE) is not None:
                    raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
                if kwargs.get(CACHE) is None:
                    kwargs[CACHE] = cache
            return override(self, **kwargs)

        method.__signature__ = inspect.signature(stock)
        return method

    return decorate


def register_key_layouts(full: str, base: str) -> None:
    """Let the classes of these names, with and without a head, load the key layouts of stock Qwen2.5-VL, and save the
    one of transformers 4 as stock does. transformers looks the renaming up by the name of a class. Qwen3-VL has one
    layout."""
    # What ZeRO-3, and models that were not loaded, saved with earlier code.
    repeated = WeightRenaming(r"^model(\.model)+", "model")
    renaming = get_checkpoint_conversion_mapping("Qwen2_5_VLForConditionalGeneration")
    register_checkpoint_conversion_mapping(full, [repeated, *renaming], overwrite=True)
    # The stock base class would leave the vision tower of newer files uninitialised.
    renaming = WeightRenaming(r"^model(?!\.(language_model|visual))", "language_model")
    register_checkpoint_conversion_mapping(base, [repeated, renaming], overwrite=True)


class WholeCheckpoint:
    """Loads a model from a checkpoint with the same weights only, where transformers logs the others and goes on, and
    saves it in one key layout.

    Comes before the class of transformers among the bases of a model.
    """

    def __init_subclass__(cls, **kwargs):
        """Give a user's subclass the key layouts of its base: transformers looks them up by the name of a class."""
        super().__init_subclass__(**kwargs)
        bases = [base for base in cls.__mro__[1:] if issubclass(base, WholeCheckpoint)]
        known = [get_checkpoint_conversion_mapping(base.__name__) for base in bases]
        layouts = next(filter(None, known), None)
        if layouts is not None and get_checkpoint_conversion_mapping(cls.__name__) is None:
            register_checkpoint_conversion_mapping(cls.__name__, layouts)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, with two refusals.

        Weights are read from safetensors only: pickles can run code. And they must be those of the model; only all
        gates together may be missing, which stock checkpoints do not have. With `output_loading_info`, which names what
        is missing and what is not expected, the caller decides. Quantizers rename weights and decide for themselves.

        Raises:
            ValueError: the checkpoint lacks weights of the model, or has others.
        """
        kwargs = {**kwargs, "use_safetensors": True}
        _warn_of_other_code(cls, args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _keep_generation_settings(model)
        if output_loading_info:
            return model, info
        if getattr(model, "hf_quantizer", None) is None:
            _check_weights(model, info["missing_keys"], info["unexpected_keys"])
        return model

    def save_pretrained(self, *args, **kwargs):
        """As in transformers, in the same key layout however the model was made, and with the checkpoint's own variant
        if `nsa_variant` was an option of loading.

        transformers reverts the renamings of loading. It finds those that were used, but takes all of them, also those
        of submodules and of old layouts, for a model that was made from a configuration or loaded under ZeRO-3.
        """
        if getattr(self, "hf_quantizer", None) is None:
            name = type(self).__name__.removeprefix("FSDP")  # what FSDP2 makes of it
            registered = get_checkpoint_conversion_mapping(name) or []
            self._weight_conversions = registered[1:]  # without `repeated`

        config = self.config
        saved = deepcopy(config)
        text_config = getattr(saved, "text_config", saved)
        text_config.nsa_variant = text_config.checkpoint_variant()
        # The layers keep theirs: another thread may be answering.
        self.config = saved
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config = config


def _warn_of_other_code(cls, source) -> None:
    """Warn if a folder has other code files than those that run.

    transformers keeps the class of the first model of a configuration for the length of a process, and does not look
    at the files of a folder again.
    """
    if not cls.__module__.startswith("transformers_modules.") or source is None or not Path(source).is_dir():
        return
    running = {path.name: path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py"}
    files = [path for path in sorted(Path(source).glob("*.py")) if path.name in running]
    changed = [path.name for path in files if path.read_bytes() != running[path.name].read_bytes()]
    if changed:
        logger.warning(
            f"{source} has another {', '.join(changed)} than the code that runs, which this process has from a model "
            "that it loaded before: start a new process to run the files of the folder"
        )


def _check_weights(model, missing, unexpected) -> None:
    names = {name for name, _ in model.named_parameters()}
    gates = {name for name in names if ".g_proj_" in name}
    missing = set(missing) - gates if gates <= set(missing) else set(missing)
    # The text model and the model without a head load from checkpoints of the whole, too.
    others = [part for part in ("visual.", "lm_head.") if not any(part in name for name in names)]
    unexpected = {name for name in unexpected if not any(part in name for part in others)}
    differences = [
        f"{verb} {len(names)} {noun}, such as {min(names)}"
        for verb, noun, names in (
            ("lacks", "of its weights", missing),
            ("has", "weights that are not of this class", unexpected),
        )
        if names
    ]
    if differences:
        raise ValueError(
            f"the checkpoint is not of a {type(model).__name__} with this configuration: it "
            f"{' and '.join(differences)}. With output_loading_info=True it loads, and the names of all are returned"
        )


def _keep_generation_settings(model) -> None:
    """Take fields of the configuration out of the generation settings, which get all arguments of `from_pretrained`."""
    settings = vars(getattr(model, "generation_config", None) or GenerationConfig())
    known = vars(GenerationConfig())
    for name in [name for name in settings if name not in known and hasattr(model.config, name)]:
        del settings[name]


def cache_of(outputs) -> Cache | None:
    """The cache in a model's outputs, an object or the tuple that stands for one."""
    if isinstance(outputs, tuple):
        return next((x for x in outputs if isinstance(x, Cache)), None)
    return getattr(outputs, CACHE, None)


def cached_length(cache: Cache | None) -> int:
    """How many tokens a cache holds; waits for the device if the cache is static.

    Raises:
        ValueError: it is no `Cache`, such as the paged one of continuous batching: it cannot tell its vision tokens.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"a {type(cache).__name__} does not keep which of its tokens are vision, so VideoNSA has no continuous "
            "batching: call generate, which takes a batch, too"
        )
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache_written(cache: Cache | None, length: int) -> None:
    """Raise a RuntimeError if `cache` does not hold `length` tokens after a forward call that had to write it."""
    if cache is not None and int(cache.get_seq_length()) != length:
        raise RuntimeError(
            f"the cache holds {int(cache.get_seq_length())} tokens after a forward call, where {length} are due: "
            f"transformers {VERSION} and VideoNSA do not fit together (tested: {' to '.join(TESTED)})"
        )


def check_attention(implementation: str | None, variant: str) -> None:
    """Raise a ValueError if a sparse variant meets an attention function that it was not written for."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if getattr(function, "__module__", "").startswith("deepspeed"):  # a wrapper, under the name of what it wraps
        raise ValueError(
            f"DeepSpeed's sequence parallelism cannot compute nsa_variant={variant!r}: each process would attend to "
            "its own tokens only. Use shard_sequence of the model, or --sequence_parallel of finetune.py"
        )
    known = implementation is None or implementation in ATTENTION_IMPLEMENTATIONS
    if not known and not implementation.startswith(HUB_ATTENTION):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot compute nsa_variant={variant!r}: it would attend densely. "
            f'Use one of {", ".join(ATTENTION_IMPLEMENTATIONS)}, or load the model with nsa_variant="dense"'
        )


class Substitute:
    """`target` with some attributes replaced, for the length of a call: the stock method that gets it as its `self`
    reads the replaced attributes, and every other caller the true ones."""

    def __init__(self, target, **attributes):
        self._target = target
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name):
        return getattr(self._target, name)
