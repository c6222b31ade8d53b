"""The fields that VideoNSA adds to the configuration, as options of scripts and as rows of model cards.

Types and defaults are those of the configuration. `MEANINGS` has a line on each field, for `--help` and for cards; a
test checks that none is missing.
"""

import argparse
from dataclasses import field, make_dataclass
from typing import get_args

from transformers.hf_argparser import string_to_bool

from videonsa.configuration_videonsa import NSA_VARIANTS, SparseTextConfig

MEANINGS = {
    "nsa_variant": f"what vision tokens compute: {', '.join(NSA_VARIANTS[:-1])} or {NSA_VARIANTS[-1]}",
    "block_size": "vision tokens per block",
    "block_count": "blocks that a vision token selects",
    "window_size": "vision tokens in the sliding window",
    "gate_temperature": "divides the logits of the gates",
    "block_spread": "merged only: estimate the attention to a block from means and variances of its keys",
    "block_per_head": "merged only: every query head chooses blocks for itself",
    "block_remainder": "merged only: read every other block, too, as the mean of its keys and of its values",
    "truncate_seconds": "cut the seconds per temporal patch to whole ones",
    "block_causal": "released only: show pooled blocks up to the query's own",
    "nsa_backend": "triton, torch, or auto: Triton on NVIDIA GPUs from sm_80 on, else PyTorch",
}
# What the three branches read.
SIZES = ("block_size", "block_count", "window_size")


def field_type(name: str) -> type:
    """What a value of a field is, other than None."""
    hint = SparseTextConfig.__annotations__[name]
    # bool, of `bool | None`.
    return next(iter(get_args(hint)), hint)


def add_fields(parser: argparse.ArgumentParser, *names: str, default: str = "the checkpoint's") -> None:
    """Give a parser the options for some fields, or for all; None stands for the default, which is only described."""
    for name in names or MEANINGS:
        kind = field_type(name)
        parser.add_argument(
            f"--{name}",
            type=string_to_bool if kind is bool else kind,
            help=f"{MEANINGS[name]} (default: {default.format(getattr(SparseTextConfig, name))})",
        )


def given_fields(args) -> dict:
    """The fields that a command line sets."""
    values = {name: getattr(args, name, None) for name in MEANINGS}
    return {name: value for name, value in values.items() if value is not None}


FieldArguments = make_dataclass(
    "FieldArguments",
    [
        (name, field_type(name) | None, field(default=None, metadata={"help": f"{meaning} (default: the model's)"}))
        for name, meaning in MEANINGS.items()
    ],
    kw_only=True,
    namespace={"__doc__": "The fields as arguments of a training script; None keeps the model's value."},
)
