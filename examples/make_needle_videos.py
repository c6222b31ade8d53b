"""Make clips in which coloured shapes flash up at known times, with questions about them.

    python examples/make_needle_videos.py needles --train 2000 --validation 100 --test 200 --seconds 4 8 16
    python examples/make_needle_videos.py haystack --test 50 --seconds 600 1800 --size 224

A clip is a moving procedural background with scene cuts and grey blobs that distract; one to three *needles* (8 shapes
in 8 colours, in one of 4 places) appear in it for a moment, once or several times. The questions are of the types
colour, shape, where, when, count ("how often") and first ("which came first"); `describe` lists all needles in order.

OUTPUT holds, per split, a folder of clips and the same samples in two formats: `train.json` in the conversation format
of Qwen-VL and `train.jsonl` as chat `messages`. Each clip follows from its seed [--seed, split, index] alone, so that
splits share none. `finetune.py` and `evaluate.py` read both files.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import json
import signal
import sys
import time

from lib.needles import QUESTIONS, SPLITS, Settings, make_dataset
from lib.options import OptionParser


@door
def main() -> None:
    default = Settings()
    parser = OptionParser(description=__doc__)
    parser.add_argument("output", help="folder to make")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=0, help=f"clips of the {split} split")

    def option(name, help, **kwargs):
        value = getattr(default, name)
        many = isinstance(value, tuple)
        kind = type(value[0] if many else value)
        kwargs = {"nargs": "+" if many else None, "type": kind, **kwargs}
        parser.add_argument(f"--{name}", default=value, help=help, **kwargs)

    option("seconds", "lengths of clips, one of which is drawn for each")
    option("fps", "frames per second", type=float)
    option("size", "width and height in pixels")
    option("needles", "numbers of needles, one of which is drawn for each clip")
    option("repeats", "share of needles that appear two or three times; 0 leaves the questions of type count out")
    option("depth", "place of the needle in the clip, from 0, its start, to 1, its end (default: any)", type=float)
    option("needle_seconds", "shortest and longest time that a needle is seen", nargs=2)
    option("needle_size", "smallest and largest needle, as a share of the frame", nargs=2)
    option("distractors", "fewest and most grey blobs of a scene", nargs=2)
    option("stills", "share of samples that are one image")
    option("questions", "types of questions", choices=QUESTIONS, metavar="TYPE")
    option("turns", "most questions per clip")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set")
    parser.add_argument("--workers", type=int, help="processes that make clips (default: one per CPU)")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a polite kill must clean up as Ctrl-C does
    fields = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    counts = {split: getattr(args, split) for split in SPLITS}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError("name how many clips to make: --train, --validation or --test")
    start = time.perf_counter()
    output = make_dataset(args.output, counts, settings, seed=args.seed, workers=args.workers)
    took = time.perf_counter() - start
    samples = [s for split in SPLITS if counts[split] for s in json.loads((output / f"{split}.json").read_text())]
    seconds = sum(sample["seconds"] for sample in samples)
    print(
        f"wrote {len(samples):,} clips to {output}: {seconds:,.0f} s in {took:.1f} s, {seconds / took:,.0f}x real time"
    )


if __name__ == "__main__":
    main()
