"""Miniature models with random weights, and model inputs built from a list of parts per sample."""

import json
import math
from dataclasses import dataclass
from itertools import chain

import torch

import videonsa
from lib import tiny
from videonsa.configuration_videonsa import VideoNSATextConfig
from videonsa.modeling_videonsa import VideoNSATextModel

# Models of both backbones. The heads of Qwen3-VL do not add up to its hidden size.
QWEN2_5 = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
QWEN3 = {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
SHAPES = {"Qwen2.5-VL": {"backbone": "qwen2_5_vl", **QWEN2_5}, "Qwen3-VL": {"backbone": "qwen3_vl", **QWEN3}}
# One of SHAPES, for which `make_inputs` makes inputs; set by the fixtures of models.
current = "Qwen2.5-VL"
# Where kernels run: natively, or in the interpreter.
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NSA = {"block_size": 16, "block_count": 4, "window_size": 20}
MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# Names of what a model has beyond the stock one, of two layers.
GATES = {
    f"model.language_model.layers.{layer}.self_attn.g_proj_{i}.{kind}"
    for layer in (0, 1)
    for i in (1, 2)
    for kind in ("weight", "bias")
}


def load(folder, **config):
    """Our model of a stock checkpoint, with gates that differ from token to token and from head to head."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = videonsa.model_class(model_type).from_pretrained(folder, **{**NSA, **config})
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "g_proj" in name:
            weight.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@dataclass(frozen=True)
class Media:
    kind: str  # image or video
    grid: tuple[int, int, int]  # in patches; 2 x 2 of them make a token
    seconds: float = 0.5  # per temporal patch: 4 fps
    seed: int = 0

    def pixels(self):
        patch = 14 if current == "Qwen2.5-VL" else 16
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(math.prod(self.grid), 3 * 2 * patch**2, generator=generator)


def video(t, h, w, **kwargs):
    return Media("video", (t, h, w), **kwargs)


def image(h, w, **kwargs):
    return Media("image", (1, h, w), **kwargs)


# Vision tokens:                               192                   15            15             48
VIDEO, IMAGE, TEXT = [5, video(12, 4, 16), 6], [3, image(6, 10), 9], [17]
MIXED = [4, image(6, 10, seed=1), 2, video(6, 4, 8, seed=2), 3, video(9, 6, 6, seconds=1.0, seed=3), 5]
SAMPLES = {"video": VIDEO, "image": IMAGE, "text": TEXT, "image and videos": MIXED}


def make_inputs(*samples, padding="left"):
    """Model inputs as a processor makes them. A sample is a list of parts, each a number of random text tokens, a list
    of given tokens, or Media; samples that begin with the same parts begin with the same tokens.

    For Qwen3-VL, each temporal patch of a video is a run of its own, with a number for its time before it."""
    tokenizer = tiny.make_tokenizer()
    token_id = tokenizer.convert_tokens_to_ids
    start, end, pad = (token_id(f"<|{name}|>") for name in ("vision_start", "vision_end", "endoftext"))
    rows, media = [], {"image": [], "video": []}
    for sample in samples:
        generator, tokens = torch.Generator().manual_seed(0), []
        for part in sample:
            if isinstance(part, Media):
                times = part.grid[0] if (current, part.kind) == ("Qwen3-VL", "video") else 1
                run = [start, *[token_id(f"<|{part.kind}_pad|>")] * (math.prod(part.grid) // 4 // times), end]
                for time in range(times):
                    tokens += run if times == 1 else [*tokenizer.encode(str(time)), *run]
                media[part.kind].append(part)
            elif isinstance(part, int):
                tokens += torch.randint(0, 256, (part,), generator=generator).tolist()
            else:
                tokens += part
        rows.append(tokens)

    def padded(rows, value):
        length = max(map(len, rows))
        fill = [[value] * (length - len(row)) for row in rows]
        pairs = zip(fill, rows, strict=True)
        return torch.tensor([a + b if padding == "left" else b + a for a, b in pairs])

    inputs = {"input_ids": padded(rows, pad), "attention_mask": padded([[1] * len(row) for row in rows], 0)}
    is_image, is_video = (inputs["input_ids"] == token_id(f"<|{kind}_pad|>") for kind in ("image", "video"))
    inputs["mm_token_type_ids"] = is_image.int() + 2 * is_video.int()
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if media[kind]:
            inputs[f"pixel_values{suffix}"] = torch.cat([part.pixels() for part in media[kind]])
            inputs[f"{kind}_grid_thw"] = torch.tensor([part.grid for part in media[kind]])
    if media["video"] and current == "Qwen2.5-VL":
        inputs["second_per_grid_ts"] = torch.tensor([float(part.seconds) for part in media["video"]])
    return inputs


def pack(model, *rows):
    """Inputs whose rows hold several samples one after another: no mask, and positions whose first component, the
    position in the text, starts anew with each sample."""
    rows = [[make_inputs(sample) for sample in row] for row in rows]

    def positions(inputs):
        rotary, _ = model.model.get_rope_index(**inputs)
        return torch.cat([torch.arange(rotary.shape[2]).expand(1, 1, -1), rotary])

    packed = {"input_ids": torch.cat([torch.cat([x["input_ids"] for x in row], 1) for row in rows])}
    packed["position_ids"] = torch.cat([torch.cat([positions(x) for x in row], 2) for row in rows], 1)
    for key in MEDIA_KEYS:
        if parts := [x[key] for x in chain.from_iterable(rows) if key in x]:
            packed[key] = torch.cat(parts)
    return packed


def unpad(x, inputs):
    """What x [batch, length, ...] holds for each sample."""
    return [row[mask.bool()] for row, mask in zip(x, inputs["attention_mask"], strict=True)]


def without_media(inputs):
    return {key: value for key, value in inputs.items() if key not in MEDIA_KEYS}


def is_vision(inputs):
    return inputs["mm_token_type_ids"] > 0


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to tolerance times the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"


@torch.no_grad()
def logits(model, inputs, **kwargs):
    return model(**{**inputs, **kwargs}).logits


def generate(model, inputs, max_new_tokens=6, **kwargs):
    """What generate() returns, with the logits of each step stacked to [steps, batch, vocabulary]."""
    kwargs = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, **kwargs)
    out.logits = torch.stack(out.logits) if out.logits else None
    out.new_tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    return out


def embed(model, inputs):
    """inputs_embeds with the features of images and videos in place."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            features = getattr(model, f"get_{kind}_features")(inputs[pixels], inputs[f"{kind}_grid_thw"]).pooler_output
            embeds[inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")] = torch.cat(features)
    return embeds


def text_model(backend: str) -> VideoNSATextModel:
    """One decoder layer of 2 query heads and 1 KV head, from the same seed each time; on a GPU if there is one."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 512}
    nsa = {"block_size": 16, "block_count": 3, "window_size": 8, "nsa_backend": backend}
    torch.manual_seed(0)
    config = VideoNSATextConfig(**heads, **sizes, **nsa, rope_parameters=rope, attn_implementation="sdpa")
    return VideoNSATextModel(config).to(KERNEL_DEVICE)
