"""Turn a stock Qwen2.5-VL checkpoint into a VideoNSA repository that loads with `trust_remote_code=True`.

    python examples/convert.py Qwen/Qwen2.5-VL-7B-Instruct VideoNSA-7B
    python examples/convert.py path/to/checkpoint VideoNSA-3B --push_to_hub me/VideoNSA-3B
    python examples/convert.py Qwen/Qwen2.5-VL-7B-Instruct Sparse-7B --nsa_variant merged    # to use without training

The weights are copied shard by shard as they are, so that memory does not depend on the size of the model; new,
untrained gates are added in shards of their own. Gates that the source has already are kept. What has the layout of the
public VideoNSA checkpoint gets `nsa_variant="released"`, the arithmetic that it was trained with (docs/released.md).
The variant "merged" has no gates.
"""

import signal
import sys

from huggingface_hub import HfApi

from lib.conversion import convert
from lib.fields import add_fields, given_fields
from lib.options import OptionParser
from videonsa.configuration_videonsa import VideoNSAConfig


def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("source", help="folder or Hub id of a Qwen2.5-VL checkpoint in safetensors")
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    add_fields(parser, default="the source's, else {}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new gates")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="also upload the result as this new Hub repository")
    parser.add_argument("--private", action="store_true", help="make the Hub repository private")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a polite kill must clean up as Ctrl-C does
    hub = HfApi()
    try:
        # First of all: it needs a login and a name that is free, and gives the name in full.
        url = hub.create_repo(args.push_to_hub, private=args.private) if args.push_to_hub else None
        try:
            name = url and url.repo_id
            output = convert(
                args.source, args.output, revision=args.revision, seed=args.seed, name=name, **given_fields(args)
            )
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
