"""Turn a stock Qwen2.5-VL checkpoint into a VideoNSA repository that loads with `trust_remote_code=True`.

    python examples/convert.py Qwen/Qwen2.5-VL-7B-Instruct VideoNSA-7B
    python examples/convert.py path/to/checkpoint VideoNSA-3B --push-to-hub me/VideoNSA-3B
    python examples/convert.py Qwen/Qwen2.5-VL-7B-Instruct Sparse-7B --variant merged    # to use without training

The weights are copied shard by shard as they are, so that memory does not depend on the size of the model; new,
untrained gates are added in shards of their own. Gates that the source has already are kept. What has the layout of the
public VideoNSA checkpoint gets `nsa_variant="released"`, the arithmetic that it was trained with (docs/released.md).
The variant "merged" has no gates.
"""

import argparse
import signal
import sys

from huggingface_hub import HfApi

from lib.conversion import convert
from videonsa.configuration_videonsa import VideoNSAConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub id of a Qwen2.5-VL checkpoint in safetensors")
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--variant", choices=("paper", "merged"), help="what vision tokens compute (default: the source's, else paper)"
    )
    parser.add_argument("--block-size", type=int, help="vision tokens per block (default: the source's, else 64)")
    parser.add_argument(
        "--block-count", type=lambda x: float(x) if "." in x else int(x),
        help="blocks per vision query; of merged also a share of them, such as 0.25 (default: the source's, else 32)",
    )  # fmt: skip
    parser.add_argument("--window-size", type=int, help="vision tokens in the window (default: the source's, else 256)")
    parser.add_argument("--gate-temperature", type=float, help="of the gates (default: the source's, else 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the new gates (default 0)")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="also upload the result as this new Hub repository")
    parser.add_argument("--private", action="store_true", help="make the Hub repository private")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a polite kill must clean up as Ctrl-C does
    fields = ("block_size", "block_count", "window_size", "gate_temperature")
    options = {name: value for name in fields if (value := getattr(args, name)) is not None}
    if args.variant:
        options["nsa_variant"] = args.variant
    hub = HfApi()
    try:
        # First of all: it needs a login and a name that is free, and gives the name in full.
        url = hub.create_repo(args.push_to_hub, private=args.private) if args.push_to_hub else None
        try:
            name = url and url.repo_id
            output = convert(args.source, args.output, revision=args.revision, seed=args.seed, name=name, **options)
        except BaseException:
            if url:
                hub.delete_repo(url.repo_id)
            raise
    except (OSError, ValueError) as error:
        sys.exit(f"convert.py: {error}")
    variant = VideoNSAConfig.from_pretrained(output).nsa_variant
    print(f'wrote {output} (nsa_variant="{variant}")')
    if url:
        try:
            hub.upload_folder(repo_id=url.repo_id, folder_path=output, commit_message="Add VideoNSA")
        except OSError as error:
            sys.exit(f"convert.py: the upload failed: {error}\nresume it with: hf upload {url.repo_id} {output}")
        print(f"pushed to {url}")


if __name__ == "__main__":
    main()
