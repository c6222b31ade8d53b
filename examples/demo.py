"""Ask a VideoNSA model about a video.

    python examples/demo.py                                        # a tiny untrained model on a clip made on the spot
    python examples/demo.py --model me/VideoNSA-7B --video talk.mp4 --question "What is the talk about?"

`--model` runs the code files of that repository (`trust_remote_code=True`), as users of the model do.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, TextStreamer
from transformers.utils import logging

import convert
import tiny

QUESTION = "What happens in this video?"


class TimedStreamer(TextStreamer):
    """Prints text as it is generated and notes when each token arrived."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = []  # seconds; the first entry is of the prompt

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)


def make_tiny_model(folder: Path) -> Path:
    """A random-weight checkpoint of the real architecture, made by the code that converts the real ones."""
    with quiet():
        stock = tiny.make_stock_checkpoint(folder / "tiny-qwen2.5-vl")
        return convert.convert(stock, folder / "tiny-videonsa", block_size=16, block_count=8, window_size=64)


@contextlib.contextmanager
def quiet():
    """No progress bars for a checkpoint of a few megabytes."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load(model: str, variant: str | None, device: str):
    """(model, processor) of a VideoNSA repository."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=True)
    if config.model_type != "videonsa":
        raise ValueError(
            f"--model {model} is a {config.model_type} checkpoint, not a VideoNSA repository; "
            f"make one with: python examples/convert.py {model} OUTPUT"
        )
    if variant is not None:
        config.nsa_variant = variant
    options = {"trust_remote_code": True, "dtype": "auto", "device_map": device}
    loaded = AutoModel.from_pretrained(model, config=config, **options).eval()
    return loaded, AutoProcessor.from_pretrained(model, trust_remote_code=True)


def report(label: str, text: str) -> None:
    print(f"{label:<10}{text}", flush=True)


def answer(model, processor, video: str, question: str, max_new_tokens: int, **video_settings) -> str:
    """Read the video, print what was read and the answer while it is generated; returns the answer."""
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, **video_settings},
    )
    read = inputs.pop("video_metadata")[0]
    del inputs["timestamps"]
    report("video", f"{video}: {read.duration:.1f} s of {read.width} × {read.height}")
    report("plan", str(read.plan))
    vision = int((inputs["mm_token_type_ids"] > 0).sum())
    report("tokens", f"{vision:,} vision, {inputs['input_ids'].numel() - vision:,} text")
    budget, pooled = (model.config.attention_budget(vision, pooled_keys=pooled) for pooled in (False, True))
    report("budget", f"{budget:.1%} of the query–key pairs of dense attention, {pooled:.1%} with the pooled keys")

    report("question", question)
    print(f"{'answer':<10}", end="", flush=True)
    streamer = TimedStreamer(processor.tokenizer)
    inputs = inputs.to(model.device)
    start = time.perf_counter()  # the vision tower may run before the streamer is given the prompt
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    _, first, *rest = streamer.times
    speed = f", then {len(rest) / (rest[-1] - first):.1f} tokens/s" if rest else ""
    report("time", f"first token after {first - start:.2f} s{speed}")
    return processor.tokenizer.decode(new_tokens, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a VideoNSA repository (default: a tiny untrained one)")
    parser.add_argument("--video", help="file or URL (default: a clip of 8 s, made on the spot)")
    parser.add_argument("--question", default=QUESTION, help=f"(default: {QUESTION})")
    parser.add_argument("--fps", type=float, help="frames per second to read (default: up to 4, within --max-tokens)")
    parser.add_argument("--max-tokens", type=int, help="of video and text together (default: 131072)")
    parser.add_argument("--prefer", help="if they do not suffice: pixels, frames or balanced (default: pixels)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--variant", help="what vision tokens compute: paper or dense (default: the checkpoint's)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help='or "auto", which spreads a large model over all GPUs (default: %(default)s)',
    )
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        try:
            source = args.model or str(make_tiny_model(Path(folder)))
            video = args.video or str(tiny.make_clip(Path(folder) / "clip.mp4"))
            model, processor = load(source, args.variant, args.device)
            name = args.model or "tiny VideoNSA with random weights: UNTRAINED, its answer is noise"
            size = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
            fields = ("nsa_variant", "block_size", "block_count", "window_size")
            settings = ", ".join(f"{field}={getattr(model.config, field)}" for field in fields)
            report("model", f"{name} ({size}, {model.dtype}, {model.device}; {settings})")
            settings = {"fps": args.fps, "max_tokens": args.max_tokens, "prefer": args.prefer}
            settings = {name: value for name, value in settings.items() if value is not None}
            answer(model, processor, video, args.question, args.max_new_tokens, **settings)
        except (OSError, ValueError, NotImplementedError) as error:
            sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    main()
