"""`finetune.py --load_in_4bit`: LoRA over weights of 4 bits, by bitsandbytes, as in QLoRA (arXiv 2305.14314)."""

import torch
from accelerate.utils import parse_flag_from_env
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.utils import is_bitsandbytes_available


def check_four_bits(method: str, args: TrainingArguments) -> None:
    """Raise a ValueError if a run cannot have weights of 4 bits."""
    if method != "lora":
        raise ValueError(f"--load_in_4bit needs --method lora, got {method}: weights of 4 bits cannot be trained")
    if not is_bitsandbytes_available():
        raise ValueError('--load_in_4bit needs bitsandbytes: pip install -e ".[ecosystem]"')
    if args.deepspeed_plugin or args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError("--load_in_4bit was not tried with FSDP or DeepSpeed: use examples/accelerate/ddp.yaml")


def four_bits(compute: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes for a language model in 4 bits, which is multiplied in the dtype `compute`.

    Vision features are sensitive to rounding: the vision tower stays as it is. So do the gates, whose class
    bitsandbytes does not know.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=[".*visual", "lm_head"],
    )


def make_trainable(model) -> None:
    """Prepare a model in 4 bits for training, and for what is saved of it."""
    # What is saved are adapters of the source, whose weights have all their bits.
    del model.config.quantization_config
    for module in model.modules():
        # On a CPU with bfloat16 instructions, bitsandbytes 0.50 packs weights when they are first evaluated, for good,
        # and packed weights pass no gradient on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
