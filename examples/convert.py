"""Turn a stock Qwen2.5-VL or Qwen3-VL checkpoint into a VideoNSA repository that loads with `trust_remote_code=True`.

    python examples/convert.py Qwen/Qwen2.5-VL-7B-Instruct VideoNSA-7B
    python examples/convert.py Qwen/Qwen3-VL-8B-Instruct VideoNSA-Qwen3-8B    # a dense one
    python examples/convert.py path/to/checkpoint VideoNSA-3B --push_to_hub me/VideoNSA-3B
    python examples/convert.py Qwen/Qwen2.5-VL-7B-Instruct Sparse-7B --nsa_variant merged    # to use without training
    python examples/convert.py --update_code VideoNSA-7B    # the code files of an older repository

The weights are copied shard by shard as they are, so that memory does not depend on the size of the model; new,
untrained gates are added in shards of their own. Gates that the source has already are kept. What has the layout of the
public VideoNSA checkpoint gets `nsa_variant="released"`, the arithmetic that it was trained with (docs/released.md).
The variant "merged" has no gates.
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import signal
import sys

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx

from lib.conversion import convert, read_config
from lib.fields import add_fields, given_fields
from lib.options import OptionParser
from lib.updating import update_code


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("source", nargs="?", help="folder or Hub id of a Qwen2.5-VL or Qwen3-VL checkpoint")
    parser.add_argument("output", nargs="?", help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    add_fields(parser, default="the source's, else {}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new gates")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="also upload the result as this new Hub repository")
    parser.add_argument("--private", action="store_true", help="make the Hub repository private")
    parser.add_argument(
        "--update_code", metavar="FOLDER", help="instead: bring the code files of a repository up to date, in place"
    )
    args = parser.parse_args()
    if (args.output is None) == (args.update_code is None) or (args.update_code and args.source):
        parser.error("name SOURCE and OUTPUT, or --update_code FOLDER")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a polite kill must clean up as Ctrl-C does
    if args.update_code:
        written, removed = update_code(args.update_code)
        for label, names in (("wrote", written), ("removed", removed)):
            print(f"{label} {', '.join(names) or 'nothing'}")
        return
    hub = HfApi()
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
    variant = read_config(output)["text_config"]["nsa_variant"]
    print(f'wrote {output} (nsa_variant="{variant}")')
    if url:
        try:
            hub.upload_folder(repo_id=url.repo_id, folder_path=output, commit_message="Add VideoNSA")
        except (OSError, httpx.HTTPError) as error:
            message = f"the upload failed: {error}; resume it with: hf upload {url.repo_id} {output}"
            raise ValueError(message) from error
        print(f"pushed to {url}")


if __name__ == "__main__":
    main()
