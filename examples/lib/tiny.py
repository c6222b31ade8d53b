"""A miniature checkpoint of a backbone and a short clip, made on the spot: what tests and the tiny VideoNSA begin with.

The checkpoint has the real architecture (of Qwen2.5-VL: vision tower with windows, multimodal rotary, grouped-query
attention with a group of 7; of Qwen3-VL: deepstack, normalised heads, a group of 4), a tokenizer with Qwen's special
tokens and a chat template of the same format, all saved by the stock classes. Its weights are random: `convert.py`
turns it into VideoNSA exactly as it would the 7B.
"""

import math
import re
import string
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .needles import COLOURS, COUNTS, PLACES, SHAPES, TIMES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

UNKNOWN = "<|unknown|>"

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{ message.content }}{% else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then Qwen's special tokens: any text round-trips with a vocabulary of 263."""
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def make_word_tokenizer(times: bool = False) -> PreTrainedTokenizerFast:
    """One token for each word, in lower case, of the chat template and of the questions and answers about needles.

    times: and for those of Qwen3-VL's times, such as "<0.2 seconds>", with a token for each digit.
    """
    chat = "system user assistant You are a helpful assistant. What How often When Where Which did was the"
    words = f"{chat} colour shape appear appeared came first, or? \n".lower()
    answers = " ".join([*COLOURS, *SHAPES, *PLACES, *TIMES, *COUNTS])
    pattern = r"\n|\w+|[^\w\s]"  # a word or a sign
    if times:
        pattern = rf"\d|{pattern}"
        answers += f" <0.1 seconds> {string.digits}"
    vocab = {word: i for i, word in enumerate(dict.fromkeys(re.findall(pattern, f"{words} {answers}")))}
    vocab[UNKNOWN] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix=UNKNOWN)  # puts the spaces back, but none before a sign
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict:
    """The fields of a configuration that name the tokens of images and videos."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def text_sizes(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int, kv_heads: int) -> dict:
    """The fields of a text decoder that all backbones have."""
    return {
        "vocab_size": 8 * math.ceil(len(tokenizer) / 8),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "initializer_range": 0.06,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vision_sizes(hidden_size: int, out_hidden_size: int) -> dict:
    """The same of a vision tower."""
    return {
        "depth": 2,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_heads": 4,
        "out_hidden_size": out_hidden_size,
    }


def make_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 224,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 7,
    num_key_value_heads: int = 1,
    vision_hidden_size: int = 96,
) -> Qwen2_5_VLConfig:
    """Stock configuration of a few million parameters; the head dimension must be a multiple of 16."""
    half = hidden_size // num_attention_heads // 2
    return Qwen2_5_VLConfig(
        text_config={
            **text_sizes(tokenizer, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [half // 8, half // 8, half - 2 * (half // 8)],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **vision_sizes(vision_hidden_size, hidden_size),
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True,
        **special_tokens(tokenizer),
    )


def make_qwen3_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 224,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 2,
    head_dim: int = 32,
    vision_hidden_size: int = 96,
) -> Qwen3VLConfig:
    """Stock configuration of a few million parameters; as in real ones, heads need not add up to the hidden size."""
    third = head_dim // 6  # of the frequencies, which rows and columns get
    return Qwen3VLConfig(
        text_config={
            **text_sizes(tokenizer, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads),
            "head_dim": head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            **vision_sizes(vision_hidden_size, hidden_size),
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
        **special_tokens(tokenizer),
    )


def make_stock_checkpoint(
    folder: str | Path, *, seed: int = 0, words: bool = False, backbone: str = "qwen2_5_vl", **config_kwargs
) -> Path:
    """Write a random-weight stock repository (weights, tokenizer, processor) to `folder` and return it.

    words: a token per word of the needle questions, in place of one per byte.
    backbone: the model_type of the stock model, "qwen2_5_vl" or "qwen3_vl".
    """
    folder = Path(folder)
    tokenizer = make_word_tokenizer(times=backbone == "qwen3_vl") if words else make_tokenizer()
    make, model_class = {
        "qwen2_5_vl": (make_config, Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (make_qwen3_config, Qwen3VLForConditionalGeneration),
    }[backbone]
    config = make(tokenizer, **config_kwargs)
    torch.manual_seed(seed)
    model = model_class(config)
    # An untrained model would sample placeholders, which no image or video stands behind.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[config.image_token_id, config.video_token_id],
    )
    model.save_pretrained(folder)
    if backbone == "qwen2_5_vl":
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), CHAT_TEMPLATE)
    else:
        # What differs from the defaults of the image processor stands in the configuration of a published one.
        norms = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = Qwen2VLImageProcessor(patch_size=16, **norms)
        processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return folder


def make_clip(
    path: str | Path,
    *,
    seconds: float = 8.0,
    fps: int = 8,
    width: int = 224,
    height: int = 224,
    codec: str = "libx264",
) -> Path:
    """Encode a clip (H.264 by default) of a disc circling over a slow gradient; returns `path`."""
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(round(seconds * fps)):
            angle = 2 * np.pi * i / (4 * fps)
            cx, cy = width * (0.5 + 0.3 * np.cos(angle)), height * (0.5 + 0.3 * np.sin(angle))
            image = np.stack([x * 200 // width, y * 200 // height, np.full_like(x, 3 * i % 256)], -1).astype(np.uint8)
            image[(x - cx) ** 2 + (y - cy) ** 2 < (height / 8) ** 2] = (230, 60, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)
