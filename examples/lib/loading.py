"""Models and processors as the scripts load them, and the inputs of a question about a video."""

import shutil
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoProcessor

from videonsa.configuration_videonsa import is_public
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

from .conversion import copy_code, load_processor
from .folders import check_source
from .needles import Settings

EXAMPLES = Path(__file__).resolve().parents[1]
# A clip as the tiny model knows them.
CLIP = Settings(seconds=(8.0,), questions=("colour", "shape", "where", "when"))
# The place of the split in the seeds of clips; training, validation and test have 0 to 2.
UNSEEN = 3


def assemble_tiny_model(folder: Path) -> Path:
    """A repository, in the new folder `folder`, of the weights in `tiny/` and the code files of this project."""
    shutil.copytree(EXAMPLES / "tiny", folder)
    copy_code(folder)
    return folder


def load(model: str, variant: str | None, device: str):
    """(model, processor) of a VideoNSA repository, or of a checkpoint in the layout of the public one."""
    check_source("model", model)
    config = AutoConfig.from_pretrained(model, trust_remote_code=True)
    if is_public(config.to_dict()):
        report("layout", f"the public VideoNSA checkpoint's, so nsa_variant={variant or 'released'}")
        options = {} if variant is None else {"nsa_variant": variant}
        loaded = VideoNSAForConditionalGeneration.from_pretrained(model, dtype="auto", device_map=device, **options)
        return loaded.eval(), load_processor(model)
    check_repository(model, config)
    if variant is not None:
        config.nsa_variant = variant
    options = {"trust_remote_code": True, "dtype": "auto", "device_map": device}
    loaded = AutoModel.from_pretrained(model, config=config, **options).eval()
    return loaded, AutoProcessor.from_pretrained(model, trust_remote_code=True)


def check_repository(model: str, config) -> None:
    """Raise a ValueError if a configuration is not that of a VideoNSA repository."""
    if config.model_type != "videonsa":
        raise ValueError(
            f"--model {model} is a {config.model_type} checkpoint, not a VideoNSA repository; "
            f"make one with: python examples/convert.py {model} OUTPUT"
        )


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
