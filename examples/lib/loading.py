"""Models and processors as the scripts load them, and the inputs of a question about a video."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import PROCESSOR_NAME, cached_file, find_adapter_config_file

from videonsa.configuration_videonsa import is_public
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.video_chat import cache_bytes

from .conversion import OURS, QUIETLY, load_processor
from .folders import TINY, check_source
from .needles import Settings
from .tiny import UNKNOWN

EXAMPLES = Path(__file__).resolve().parents[1]
DAMAGED = (JSONDecodeError, UnicodeDecodeError, SafetensorError, SyntaxError, TemplateError)
# docs/videos.md says how long they take.
CPU_TOKENS = 8192
# A clip as the tiny model knows them.
CLIP = Settings(seconds=(8.0,), questions=("colour", "shape", "where", "when"))
# The place of the split in the seeds of clips; training, validation and test have 0 to 2.
UNSEEN = 3


def assemble_tiny_model(folder: Path) -> Path:
    """A copy of the tiny model, with files in place of links, in the new folder `folder`."""
    return shutil.copytree(TINY, folder)


def load(model: str, device: str, **fields):
    """(model, processor) of a VideoNSA repository, of a LoRA adapter of one, or of a checkpoint in the public layout.

    Args:
        model: folder or Hub id. An adapter is a folder such as `checkpoint-100` or `tuned/adapter`: it is merged into
            the base model that it names.
        device: of torch, or "auto".
        fields: of the configuration, such as `nsa_variant`; others keep the checkpoint's values.

    Raises:
        OSError, ValueError: it is none of these, or damaged.
    """
    model = check_source("model", model)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here")
    with naming(model):
        return _load(model, device, fields)


def _load(model: str, device: str, fields: dict):
    adapter = find_adapter(model)
    source = model if adapter is None else adapter.base
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    if is_public(config.to_dict()):
        variant = fields.get("nsa_variant", "released")
        report("layout", f"the public VideoNSA checkpoint's, so nsa_variant={variant}")
        loaded = VideoNSAForConditionalGeneration.from_pretrained(model, dtype="auto", device_map=device, **fields)
        return loaded.eval(), load_processor(model)
    check_repository(source, config)
    if adapter is not None and adapter.has_config:
        config = type(config).from_pretrained(model)
    for name, value in fields.items():
        setattr(config, name, value)
    options = {"trust_remote_code": True, "dtype": "auto", "device_map": device}
    loaded = AutoModel.from_pretrained(source, config=config, **options)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, model).merge_and_unload()
        source = model if adapter.has_processor else source
    return loaded.eval(), AutoProcessor.from_pretrained(source, trust_remote_code=True)


@dataclass(frozen=True)
class Adapter:
    """A folder or Hub repository of LoRA weights: its base model, and what else it holds."""

    base: str
    has_config: bool
    has_processor: bool


def find_adapter(model: str) -> Adapter | None:
    """What `model` is, if it is an adapter."""
    path = find_adapter_config_file(model)
    if path is None:
        return None
    base = json.loads(Path(path).read_text())["base_model_name_or_path"]
    base = check_source(f"{model} is an adapter, whose base model", base)
    return Adapter(base, *(cached_file(model, name, **QUIETLY) is not None for name in ("config.json", PROCESSOR_NAME)))


@contextlib.contextmanager
def naming(model: str):
    """Turn errors about damaged files of a repository, which name no file, into a ValueError that names the model."""
    try:
        yield
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError(f"model {model}: its weights have other shapes than its config.json") from error
        # What the package tokenizers raises is a bare Exception.
        if type(error) is Exception or isinstance(error, DAMAGED):
            raise ValueError(f"model {model} has a damaged file: {error}") from error
        raise


def check_repository(model: str, config) -> None:
    """Raise a ValueError if a configuration is not that of a VideoNSA repository."""
    if config.model_type not in OURS:
        raise ValueError(
            f"--model {model} is a {config.model_type} checkpoint, not a VideoNSA repository; "
            f"make one with: python examples/convert.py {model} OUTPUT"
        )


def token_budget(model, most: int) -> int:
    """Tokens of a prompt that a model's device reads in a time that one waits for, or has the memory for.

    A CPU gets `CPU_TOKENS`. A GPU gets `most`, halved until keys and values take at most half of what is free.
    """
    if model.device.type == "cpu":
        return min(most, CPU_TOKENS)
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        while most > CPU_TOKENS and 2 * most * cache_bytes(model) > free:
            most //= 2
    return most


def empty_answer(processor) -> str:
    """What to say of an answer without a word."""
    said = "empty: the model ended its answer at once"
    few_words = UNKNOWN in processor.tokenizer.get_vocab()
    return f"{said}; this tiny model knows nothing but coloured shapes" if few_words else said


def report(label: str, text: str) -> None:
    print(f"{label:<10}{text}", flush=True)


def read(processor, video: str, question: str, **settings):
    """(model inputs of a question about a video, metadata of what was read of it)."""
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, **settings},
    )
    del inputs["timestamps"]
    return inputs, inputs.pop("video_metadata")[0]
