"""Turns a checkpoint of Qwen2.5-VL, Qwen3-VL or VideoNSA into a VideoNSA repository: what `convert.py` does."""

import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from videonsa import config_class, model_class, modeling_videonsa
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.nsa_checks import BRANCHES
from videonsa.processing_videonsa import VideoNSAProcessor, VideoNSAQwen3Processor, VideoNSAVideoProcessor
from videonsa.vision_attention import GATE_STD, spreads_as_made

from .card import write_card
from .folders import check_new, check_source, new_folder

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*"]
# By the model_type of config.json: of what can be converted, the stock processor and ours; of repositories, ours.
STOCK = {
    "qwen2_5_vl": (Qwen2_5_VLProcessor, VideoNSAProcessor),
    "qwen3_vl": (Qwen3VLProcessor, VideoNSAQwen3Processor),
}
OURS = {"videonsa": VideoNSAProcessor, "videonsa_qwen3": VideoNSAQwen3Processor}
PICKLES = re.compile(r"\.(bin|pt|pth|ckpt)(\.index\.json)?$")
QUERY_WEIGHT = ".self_attn.q_proj.weight"
GATES = re.compile(r"\.g_proj_[12]\.(weight|bias)$")
MAX_SHARD = 2**30  # bytes of new gates per shard
# `cached_file` then returns None for a file that is not there.
QUIETLY = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

UNTRAINED = """\
**The gates are untrained**: fine-tune before you use the sparse attention. Until then, `nsa_variant="dense"` gives the
answers of the base model, as below."""
TRAINED = "The gates are those of the source checkpoint."
RELEASED = """\
The gates are those of the source checkpoint, and `nsa_variant="released"` computes what they were trained with, which
differs from the published method; `nsa_variant="paper"` computes that, and needs some fine-tuning first."""
MERGED = """\
No training was needed and no weight was added (`nsa_variant="merged"`): a vision token attends to all text before it
and to the chosen blocks in one softmax. Videos of no more tokens than they hold get the base model's answers."""


def convert(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    seed: int = 0,
    name: str | None = None,
    **nsa_fields,
) -> Path:
    """Write a VideoNSA repository to the folder `output` and return it.

    Args:
        source: folder, or id of a Hub repository, of a Qwen2.5-VL or dense Qwen3-VL checkpoint in safetensors, or of a
            VideoNSA repository, which keeps its fields and the settings of its processor.
        output: folder to make; it appears only when complete.
        revision: branch, tag or commit of the Hub repository.
        seed: of the new gates, N(0, 0.02) with zero bias.
        name: what the model card calls the model; default: the folder's name.
        **nsa_fields: fields of `SparseTextConfig`, such as `block_size`.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        ValueError: the source is neither in safetensors, or a shard or a field is wrong.
    """
    output = check_new(output)
    VideoNSAConfig(**nsa_fields)  # raises for most bad ones before anything is downloaded
    origin, source = str(source), fetch_source(source, revision)
    config = config_class(read_config(source)["model_type"]).from_pretrained(source, **nsa_fields)
    if config.nsa_variant == "merged":
        config.text_config.validate_variant()  # raises where other fields do not fit it
    shards = find_shards(source)

    with new_folder(output) as partial:
        trained_gates, dtype = write_weights(shards, partial, config.text_config, seed)
        merged = config.nsa_variant == "merged"
        config.architectures = [model_class(config.model_type).__name__]
        config.dtype = dtype
        config.save_pretrained(partial)
        load_processor(source).save_pretrained(partial)
        for file in ("generation_config.json", "LICENSE"):
            if (source / file).is_file():
                shutil.copyfile(source / file, partial / file)
        copy_code(partial)
        trained = RELEASED if config.nsa_variant == "released" else TRAINED
        note, options = (trained, {}) if trained_gates else (UNTRAINED, {"nsa_variant": "dense"})
        note, options = (MERGED, {}) if merged else (note, options)
        write_card(source, partial, config, base=origin, name=name or output.name, note=note, **options)
    return output


def code_files() -> list[Path]:
    """What loads a repository: every file of the package but `__init__.py`, which serves `import videonsa`."""
    folder = Path(modeling_videonsa.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def copy_code(folder: Path, source: str | None = None) -> None:
    """Write the code files that load a repository to its folder: those of the repository `source`, or, if it lacks one
    or there is no source, those of the package."""
    for path in code_files():
        own = source and cached_file(source, path.name, **QUIETLY)
        shutil.copyfile(own or path, folder / path.name)


def fetch_source(source: str | Path, revision: str | None) -> Path:
    """The local folder of a checkpoint; of a Hub repository, what is small is downloaded and checked first."""
    source = check_source("source", source)
    folder = Path(source)
    hub = not folder.is_dir()
    if hub:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=SMALL_FILES))
    config = read_config(folder)
    kind = config.get("model_type")
    if kind not in (*STOCK, *OURS):
        raise ValueError(
            f"source {source} must be a checkpoint of Qwen2.5-VL or of dense Qwen3-VL (model_type "
            f"{' or '.join(STOCK)}), got {kind}"
        )
    if "quantization_config" in config:
        raise ValueError(f"source {source} is quantized; convert the original checkpoint and quantize the result")
    if hub:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if PICKLES.search(path.name))
        found = f"only {', '.join(pickles)}" if pickles else "no weights in safetensors"
        raise ValueError(
            f"source {source} holds {found}; safetensors are needed. Rewrite a pickle checkpoint that you trust by "
            f"AutoModelForImageTextToText.from_pretrained({str(source)!r}, use_safetensors=False)"
            ".save_pretrained(folder) and convert that folder"
        )
    return folder


def read_config(folder: str | Path) -> dict:
    """The content of config.json; empty where there is none."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def find_shards(source: Path) -> dict[Path, dict[str, torch.Size]]:
    """The weight files with their keys and shapes, each opened once so that a damaged one is found before copying."""
    index = source / SAFE_WEIGHTS_INDEX_NAME
    if (source / SAFE_WEIGHTS_NAME).is_file():
        weight_map = None
        files = [source / SAFE_WEIGHTS_NAME]
    elif index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = [source / file for file in sorted(set(weight_map.values()))]
    else:
        raise ValueError(f"source {source} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    shards = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                shards[file] = {key: torch.Size(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"shard {file} is missing or damaged: {error}") from error
    absent = set(weight_map or ()) - {key for keys in shards.values() for key in keys}
    if absent:
        raise ValueError(f"{index} names {len(absent)} weights that its shards lack, such as {min(absent)}")
    return shards


def write_weights(shards, folder: Path, text_config, seed: int) -> tuple[bool, torch.dtype]:
    """Copy the shards, add gates and the index; returns whether there were trained gates already, and the weights'
    dtype."""
    shapes = {key: shape for keys in shards.values() for key, shape in keys.items()}
    layers = sorted(
        (key.removesuffix("q_proj.weight") for key in shapes if key.endswith(QUERY_WEIGHT)),
        key=lambda prefix: int(prefix.split(".")[-3]),
    )
    if len(layers) != text_config.num_hidden_layers:
        raise ValueError(f"the weights have {len(layers)} decoder layers, config.json {text_config.num_hidden_layers}")
    first = next(file for file, keys in shards.items() if f"{layers[0]}q_proj.weight" in keys)
    with safe_open(first, framework="pt") as shard:
        dtype = shard.get_slice(f"{layers[0]}q_proj.weight")[:1].dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the weights must be bf16, fp16 or fp32, got {dtype}; convert the unquantized checkpoint")

    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    gated = [layer for layer in layers if f"{layer}g_proj_1.weight" in shapes]
    if gated and gated != layers:
        raise ValueError(f"the weights have gates in {len(gated)} of {len(layers)} decoder layers")
    per_layer = {
        "g_proj_1.weight": (hidden, hidden),
        "g_proj_1.bias": (hidden,),
        "g_proj_2.weight": (len(BRANCHES) * heads, hidden),
        "g_proj_2.bias": (len(BRANCHES) * heads,),
    }
    layer_bytes = sum(torch.Size(shape).numel() for shape in per_layer.values()) * dtype.itemsize
    step = max(1, MAX_SHARD // layer_bytes)
    add = not gated and text_config.nsa_variant != "merged"
    gate_shards = [layers[i : i + step] for i in range(0, len(layers), step)] if add else []

    count, weight_map = len(shards) + len(gate_shards), {}
    names = iter([f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)])
    total = sum(file.stat().st_size for file in shards)
    gate_bytes = layer_bytes * len(layers) if add else 0
    with tqdm(total=total + gate_bytes, unit="B", unit_scale=True, desc="weights", disable=None) as bar:
        for file, keys in shards.items():
            name = next(names)
            with file.open("rb") as reader, (folder / name).open("wb") as writer:
                while part := reader.read(2**24):
                    bar.update(writer.write(part))
            weight_map.update(dict.fromkeys(keys, name))
        generator = torch.Generator().manual_seed(seed)
        for part in gate_shards:
            name = next(names)
            gates = {
                layer + key: (
                    torch.zeros(shape)
                    if key.endswith("bias")
                    else torch.empty(shape).normal_(0, GATE_STD, generator=generator)
                ).to(dtype)
                for layer in part
                for key, shape in per_layer.items()
            }
            save_file(gates, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(gates, name))
            bar.update(layer_bytes * len(part))
    index = {"metadata": {"total_size": total + gate_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return has_trained_gates(shards), dtype


def has_trained_gates(shards) -> bool:
    """Whether there are gates that are not as new ones are made; the rule is that of `untrained_gates`."""
    for file, keys in shards.items():
        with safe_open(file, framework="pt") as shard:
            for key in filter(GATES.search, keys):
                x = shard.get_tensor(key)
                new = not x.any() if key.endswith("bias") else spreads_as_made(x)
                if not new:
                    return True
    return False


def load_processor(source: str | Path) -> VideoNSAProcessor | VideoNSAQwen3Processor:
    """The source's tokenizer, chat template and image processor with VideoNSA's video processor."""
    kind = read_config(source).get("model_type", "qwen2_5_vl")
    if kind in OURS:
        return OURS[kind].from_pretrained(source, trust_remote_code=False)  # by the code of this project
    stock_class, own_class = STOCK[kind]
    stock = stock_class.from_pretrained(source)
    video = stock.video_processor
    kept = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "resample")
    side = video.patch_size * video.merge_size
    size = {"shortest_edge": side**2, "longest_edge": (8 * side) ** 2}  # at most 64 tokens per two frames
    return own_class(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        video_processor=VideoNSAVideoProcessor(size=size, **{key: getattr(video, key) for key in kept}),
        chat_template=stock.chat_template,
    )
