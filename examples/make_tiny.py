"""Make the model that the training of the tiny VideoNSA starts from: see `make tiny`.

    python examples/make_tiny.py build/tiny/start
    python examples/make_tiny.py build/tiny/qwen3-start --backbone qwen3_vl

It has the real architecture with a few million random weights, and a token per word of the questions about needles.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import tempfile
from pathlib import Path

from lib.conversion import STOCK, convert
from lib.options import OptionParser
from lib.tiny import make_stock_checkpoint

# What it sees: block_count of 8 blocks in 4 s, of 64 in 32 s, and as many tokens as two blocks nearby.
NSA = {"block_size": 16, "block_count": 4, "window_size": 32}


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("output", help="folder to make: a VideoNSA repository with random weights and a token per word")
    parser.add_argument("--backbone", choices=STOCK, default="qwen2_5_vl", help="model_type of the stock architecture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = f"tiny-{args.backbone}".replace("2_5", "2.5").replace("_", "-")
        stock = make_stock_checkpoint(Path(folder) / name, seed=args.seed, words=True, backbone=args.backbone)
        convert(stock, args.output, **NSA, seed=args.seed)


if __name__ == "__main__":
    main()
