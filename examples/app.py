"""A page on which to ask a VideoNSA model about a video; `pip install -e ".[app]"` installs what it needs.

    python examples/app.py                           # the tiny trained model
    python examples/app.py --model me/VideoNSA-7B
    python examples/app.py --write_space my-space    # a folder to upload as a Hugging Face Space

A video is uploaded or named by its address. What would be read of it is shown before it is read; answers are streamed
and can be stopped; later questions find the video in the model's cache. A page that is loaded again finds its
conversation. The files of visitors lie in one temporary folder, which goes when the app ends, and go with them; no
other file is served. `--share` gives the page a public address. The model's side of it is `VideoChat`. `--model` runs
the code files of that repository (`trust_remote_code=True`).
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from lib.fields import add_fields, given_fields
from lib.folders import TINY
from lib.loading import CPU_TOKENS, load, token_budget
from lib.network import check_port, refuse_private_addresses
from lib.options import OptionParser, add_device
from lib.space import write_space
from lib.visits import App, Limits
from lib.zero_gpu import LentChat, is_zero_gpu
from videonsa.video_chat import VideoChat


def launch(app: App, name: str, **options):
    """Serve the page of an app for the model `name`; returns what `Blocks.launch` returns."""
    # Before Gradio is imported: its cache is the folder of the app, and it is to ask no server for news.
    os.environ.update(GRADIO_TEMP_DIR=str(app.files), GRADIO_ANALYTICS_ENABLED="False")
    from lib.page import serve

    return serve(app, name, **options)


def serve(app: App, args) -> None:
    """Serve the page until the process is ended, and say where it is."""
    options = {"server_name": args.host, "server_port": args.port, "share": args.share or None}
    # Quiet, since Gradio advertises. It still says a public address.
    _, local, _ = launch(app, args.model or "tiny VideoNSA", quiet=True, prevent_thread_lock=True, **options)
    print(f"Open {local} in a browser; Ctrl-C ends it.", flush=True)
    threading.Event().wait()


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    default = Limits()
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL"),
        help="folder or Hub id of a VideoNSA repository (default: the variable MODEL, or the tiny trained one)",
    )
    add_fields(parser, "nsa_variant", "nsa_backend")
    add_device(parser)
    parser.add_argument("--host", help="address to serve on; 0.0.0.0 is all of this machine's (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to serve on (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also serve at a public address, through Gradio's servers")
    parser.add_argument("--max_megabytes", type=int, default=default.megabytes, help="largest video in MB")
    parser.add_argument("--max_seconds", type=float, default=default.seconds, help="longest video in seconds")
    parser.add_argument(
        "--max_tokens", type=int, help=f"most tokens of a prompt (default: {default.tokens}; on a CPU {CPU_TOKENS})"
    )
    parser.add_argument("--max_new_tokens", type=int, default=default.new_tokens, help="most tokens of an answer")
    parser.add_argument("--visitors", type=int, default=default.visitors, help="visitors whose videos are kept")
    parser.add_argument("--queue", type=int, default=default.queue, help="questions that may wait")
    parser.add_argument("--timeout", type=float, default=default.timeout, help="seconds to wait for a server")
    parser.add_argument("--private_urls", action="store_true", help="also read from private networks and this machine")
    parser.add_argument("--write_space", metavar="FOLDER", help="write a folder to upload as a Space, and stop")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a polite kill must clean up as Ctrl-C does
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("no Gradio", name="gradio")
    if args.write_space and args.model != os.environ.get("MODEL"):
        raise ValueError("--write_space takes no --model: set the variable MODEL of the Space")
    if args.write_space:
        folder = write_space(args.write_space)
        print(f"wrote {folder}; upload it with: hf upload --repo-type space me/space-name {folder}")
        return
    if args.port is not None:
        check_port(args.host, args.port, "leave it out for the first free one from 7860 on")
    print(f"Loading {args.model or 'the tiny model'}.", flush=True)
    with tempfile.TemporaryDirectory(prefix="videonsa-app-") as folder:
        chat = VideoChat(*load(args.model or TINY, args.device, **given_fields(args)))
        tokens = args.max_tokens or token_budget(chat.model, default.tokens)
        print(f"prompts of up to {tokens:,} tokens on a {chat.model.device.type}; --max_tokens changes it")
        if is_zero_gpu():
            chat = LentChat(chat)
        limits = Limits(
            args.max_megabytes, args.max_seconds, tokens, args.max_new_tokens, args.visitors, args.queue,
            args.timeout,
        )  # fmt: skip
        if not args.private_urls:
            refuse_private_addresses()
        app = App(chat, Path(folder) / "files", limits, examples=not args.model)
        # Ctrl-C is the way to end it.
        with contextlib.suppress(KeyboardInterrupt):
            serve(app, args)


if __name__ == "__main__":
    main()
