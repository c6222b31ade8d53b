"""Ask a VideoNSA model about a video.

    python examples/demo.py                # the tiny trained model, on an unseen clip: what `make demo` runs
    python examples/demo.py --seed 2       # on another one
    python examples/demo.py --model me/VideoNSA-7B --video talk.mp4 --question "What is the talk about?"

The tiny model (`examples/tiny`) knows nothing but the clips of `make_needle_videos.py`; what is true of them is printed
beside its answers. Without options it answers every question, and the exit status is 1 if it does not. `--model` runs
the code files of that repository (`trust_remote_code=True`), as users of it do; for the public checkpoint
(Enxin/VideoNSA), which has none, those of this project.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

from transformers import TextStreamer
from transformers.utils import logging

from lib.fields import SIZES, add_fields, given_fields
from lib.folders import TINY
from lib.loading import CLIP, UNSEEN, empty_answer, load, read, report, token_budget
from lib.needles import make_sample
from lib.options import OptionParser, add_device
from lib.progress import prefill_progress
from videonsa.transformers_compat import cache_of
from videonsa.video_moments import AnswerAttention, Moment, patch_shares, pick_moments
from videonsa.video_planner import PREFERENCES

QUESTION = "What happens in this video?"
SEED = 1  # of the clip whose questions the tiny model answers on every machine
TRUTH_COLUMN = 10  # characters of an answer before the truth stands beside it
MOMENTS = 3  # that are printed at most


class TimedStreamer(TextStreamer):
    """Prints text as it is generated, keeps it, and notes when each token arrived."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = []  # seconds; the first entry is of the prompt
        self.text = ""

    def put(self, value):
        self.times.append(time.perf_counter())
        if len(self.times) == 2:  # the first token: until then, the line shows how far the prompt is read
            print(f"{'answer':<10}", end="", flush=True)
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        # What follows an answer goes on in its line, so the end of the stream ends no line.
        self.text += text
        print(text, end="", flush=True)


def report_reading(model, video: str, metadata, inputs) -> None:
    """Print what was read of a video, and what the sparse attention saves."""
    report("video", f"{video}: {metadata.duration:.1f} s of {metadata.width} × {metadata.height}")
    report("plan", str(metadata.plan))
    vision = int((inputs["mm_token_type_ids"] > 0).sum())
    report("tokens", f"{vision:,} vision, {inputs['input_ids'].numel() - vision:,} text")
    share, pooled = (model.config.attention_budget(vision, pooled_keys=pooled) for pooled in (False, True))
    saved = "" if pooled < 1 else ": nothing is saved on so short a video"
    shares = f"{share:.1%} of the query–key pairs of dense attention, {pooled:.1%} with the pooled keys"
    report("attention", shares + saved)


def answer(model, processor, inputs, metadata, max_new_tokens: int, truth: str | None = None) -> bool | None:
    """Print the answer while it is generated, the truth beside it, and the moments that it attended to; returns
    whether answer and truth agree, if that is known."""
    streamer = TimedStreamer(processor.tokenizer)
    start = time.perf_counter()  # the vision tower may run before the streamer is given the prompt
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    with AnswerAttention(model) as attention, prefill_progress(model):
        output = model.generate(**inputs, **options, streamer=streamer)
    ends = model.generation_config.eos_token_id
    complete = int(output.sequences[0, -1]) in (ends if isinstance(ends, list) else [ends])
    rest_of_line = "" if complete else " … (cut: --max_new_tokens)"
    if complete and not streamer.text.strip():
        rest_of_line = f"({empty_answer(processor)})"
    right = None
    if truth is not None:
        right = complete and streamer.text.strip() == truth
        gap = " " * max(2, TRUTH_COLUMN - len(streamer.text + rest_of_line))
        rest_of_line += f"{gap}truth  {truth:<{TRUTH_COLUMN}}{'✓' if right else '✗'}"
    print(rest_of_line, flush=True)

    _, first, *rest = streamer.times
    speed = f", then {len(rest) / (rest[-1] - first):.1f} tokens/s" if rest else ""
    report("time", f"first token after {first - start:.2f} s{speed}")

    vision = (inputs["mm_token_type_ids"][0] > 0).nonzero().squeeze(1).cpu()
    seconds = metadata.sample_times[:: processor.video_processor.temporal_patch_size]
    shares = patch_shares([attention.received(cache_of(output))[vision].view(len(seconds), -1)])
    picked = pick_moments(shares, most=MOMENTS, least=1 / len(shares))
    report("looked at", ", ".join(str(Moment(seconds[i], shares[i])) for i in picked))
    return right


def summarise(answers: list[bool], *, fixed: bool, seed: int) -> None:
    """Print how many answers were right and what to try next; ends the program if the fixed clip has a wrong one."""
    count = f"{sum(answers)} of {len(answers)} right"
    if fixed and not all(answers):
        sys.exit(
            f"{count}, where this model answers all of them: this installation computes something else. "
            "`make test` tells more; please report it (CONTRIBUTING.md)."
        )
    python = Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())
    command = [str(python.relative_to(Path.cwd())) if inside else "python", sys.argv[0], "--seed", str(seed + 1)]
    print(f"{count}. Next: another clip, `{shlex.join(command)}`; your own video, README.md, “Use a checkpoint”.")


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("--model", help="folder or Hub id of a VideoNSA repository (default: the tiny trained one)")
    parser.add_argument("--video", help=f"file or URL (default: a clip of {CLIP.seconds[0]:g} s, made on the spot)")
    parser.add_argument(
        "--question", help=f"what to ask (default: {QUESTION} Of a clip made on the spot: all questions about it)"
    )
    parser.add_argument("--seed", type=int, help=f"seed of the clip made on the spot (default: {SEED})")
    parser.add_argument("--fps", type=float, help="frames per second to read (default: up to 4, within --max_tokens)")
    parser.add_argument(
        "--max_tokens", type=int, help="most tokens of video and text together (default: 131072; CPU: 8192)"
    )
    parser.add_argument("--prefer", choices=PREFERENCES, help="what to keep if these do not suffice (default: pixels)")
    parser.add_argument(
        "--max_new_tokens", type=int, help="most tokens of an answer (default: 128; 16 if the right one is known)"
    )
    add_fields(parser, "nsa_variant", "nsa_backend")
    add_device(parser)
    args = parser.parse_args()
    # Before the model is loaded, which may take minutes.
    if args.video and ":" not in args.video and not Path(args.video).exists():
        raise FileNotFoundError(f"--video {args.video}: there is no such file")
    settings = {name: getattr(args, name) for name in ("fps", "max_tokens", "prefer")}
    settings = {name: value for name, value in settings.items() if value is not None}
    fixed = all(value is None for name, value in vars(args).items() if name != "device")
    seed = SEED if args.seed is None else args.seed

    # They are for those who write code, and would be printed amid an answer. In tests they are errors.
    warnings.simplefilter("ignore", FutureWarning)
    if args.model is None:
        logging.disable_progress_bar()  # loading 10 MB takes no time

    with tempfile.TemporaryDirectory() as folder:
        answers = ask(args, Path(folder), seed, settings)
    if answers:
        print()
        summarise(answers, fixed=fixed, seed=seed)


def ask(args, folder: Path, seed: int, settings: dict) -> list[bool]:
    """Ask what the command line says; returns which answers were right, if that is known."""
    model, processor = load(args.model or TINY, args.device, **given_fields(args))
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
    values = ", ".join(f"{field}={getattr(model.config, field)}" for field in ("nsa_variant", *SIZES))
    name = args.model or "tiny VideoNSA, trained on clips like the following"
    report("model", f"{name} ({size}, {model.dtype}, {model.device}; {values})")
    if args.max_tokens is None:
        settings = {**settings, "max_tokens": token_budget(model, processor.video_processor.max_tokens)}
        limit, text = settings["max_tokens"], processor.video_processor.text_tokens
        budget = f"{limit:,} tokens on a {model.device.type}, {text:,} of them for text"
        report("limit", f"{budget}; --max_tokens changes it")

    video, title, questions = args.video, args.video, [{"question": args.question or QUESTION}]
    if video is None:
        sample = make_sample(folder / "clip", CLIP, (seed, UNSEEN, 0))
        video, title = sample["video"], f"made on the spot, seed {seed}"
        questions = questions if args.question else sample["questions"]

    answers = []
    for i, asked in enumerate(questions):
        inputs, metadata = read(processor, video, asked["question"], **settings)
        if i == 0:
            report_reading(model, title, metadata, inputs)
        print()
        report("question", asked["question"])
        truth = asked.get("answer")
        most = args.max_new_tokens or (128 if truth is None else 16)
        answers.append(answer(model, processor, inputs.to(model.device), metadata, most, truth))
    return [right for right in answers if right is not None]


if __name__ == "__main__":
    main()
