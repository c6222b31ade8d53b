"""Answer requests in the format of OpenAI's API; `pip install -e ".[serve]"` installs what it needs.

    python examples/serve.py tiny
    python examples/serve.py VideoNSA-7B --port 8001

Requests name the model as the command does. Their videos and images are web addresses or base64 (`data:` URLs). Files
are refused, except those in `--media_folder`; so are private networks, except with `--private_urls`. Answers come one
after the other, streamed or whole, and end when their client leaves. There are no keys: whoever reaches the port can
ask. The protocol is that of `transformers serve`, by its own code. The code files of MODEL are run
(`trust_remote_code=True`).
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import importlib.util
from pathlib import Path

from lib.fields import add_fields, given_fields
from lib.loading import load, report, token_budget
from lib.network import check_port, refuse_private_addresses
from lib.options import OptionParser, add_device


@door
def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a VideoNSA repository, or tiny")
    add_fields(parser, "nsa_variant", "nsa_backend")
    add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 is all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="port to serve on")
    parser.add_argument(
        "--max_tokens", type=int, help="most tokens of video and text together (default: 131072; CPU: 8192)"
    )
    parser.add_argument("--media_folder", type=Path, help="folder whose files requests may name (default: none)")
    parser.add_argument("--private_urls", action="store_true", help="also read from private networks and this machine")
    args = parser.parse_args()

    for package in ("fastapi", "openai", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"no {package}", name=package)
    if args.media_folder and not args.media_folder.is_dir():
        raise ValueError(f"--media_folder {args.media_folder}: there is no such folder")
    check_port(args.host, args.port, "name another one")
    if not args.private_urls:
        refuse_private_addresses()
    report("model", f"loading {args.model}")
    model, processor = load(args.model, args.device, **given_fields(args))
    tokens = args.max_tokens or token_budget(model, processor.video_processor.max_tokens)
    report("limit", f"{tokens:,} tokens of video and text on a {model.device.type}; --max_tokens changes it")

    # Here, since it needs the packages.
    import uvicorn

    from lib.serving import Handler, make_app

    app = make_app(Handler(args.model, model, processor, tokens, args.media_folder))
    report("serving", f"http://{args.host}:{args.port}/v1; Ctrl-C ends it")
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
