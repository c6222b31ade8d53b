"""The door of every script: a user's mistake leaves by one line, an error that nobody expected by its traceback.

Scripts import it before all else, since it also names the extra of a package that is missing at their imports.
"""

import contextlib
import functools
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

# Package as it is imported: the extra of setup.cfg that installs it.
EXTRAS = {
    "accelerate": "demo",
    "datasets": "train",
    "fastapi": "serve",
    "gradio": "app",
    "lmms_eval": "eval",
    "matplotlib": "analyze",
    "openai": "serve",
    "peft": "train",
    "qwen_vl_utils": "demo",
    "tensorboard": "train",
    "tqdm": "demo",
    "uvicorn": "serve",
    "yaml": "train",
    # What the package itself needs: one who has none of it has not installed it.
    **dict.fromkeys(("av", "huggingface_hub", "numpy", "PIL", "safetensors", "torch", "torchvision"), "demo"),
    **dict.fromkeys(("transformers", "videonsa"), "demo"),
}
# The clients of huggingface_hub, up to version 1 and from 2 on.
CLIENTS = ("httpcore", "httpcore2", "httpx", "httpx2")
# All that these packages raise is about a network, a file or what a file says.
OUTSIDE = (*CLIENTS, "huggingface_hub", "jinja2", "requests", "safetensors", "yaml")
# A ValueError from inside of these is a bug: they were given wrong tensors.
INSIDE = ("torch", "numpy")
# What the Trainer says of a tracker that is not there.
NEEDS = re.compile(r"requires [\w. `]+ to be installed|(is not|isn't|not) installed")
# The names that transformers 5.17 knows; newer versions warn of them, wherever PEFT and the Trainer call them.
OLD_NAMES = r"`\w*gradient_checkpointing\w*` is deprecated"
NETWORK = "no connection ({}): check the network, or name a local folder"


def door(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, ended with one line and exit status 1 by what `explain` explains, and with 130 by Ctrl-C."""
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def enter():
        try:
            with bars_on_terminals(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", OLD_NAMES, FutureWarning)
                return main()
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if (line := explain(error)) is None:
                raise
            sys.exit(f"{script}: {line}")

    return enter


@contextlib.contextmanager
def bars_on_terminals():
    """Turn off the bars of transformers, which reading and loading have, where stderr is no terminal."""
    logging = getattr(sys.modules.get("transformers.utils"), "logging", None)
    if logging is None or sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def explain(error: Exception) -> str | None:
    """One line for a user's mistake, a missing package, a broken file or a network; None for any other error."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return EXTRAS.get(package) and f'needs {package}: pip install -e ".[{EXTRAS[package]}]"'
    text = " ".join(str(error).split()) or type(error).__name__
    package = type(error).__module__.partition(".")[0]
    if package in CLIENTS:
        return NETWORK.format(text)
    if package in OUTSIDE:
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.partition('. ')[0]}: a smaller --max_tokens, --fps or --batch_size needs less"
    if isinstance(error, ImportError | RuntimeError):
        return text if NEEDS.search(text) else None
    if isinstance(error, ValueError) and raised_by(error).partition(".")[0] in INSIDE:
        return None
    return text if isinstance(error, OSError | ValueError) else None


def raised_by(error: Exception) -> str:
    """Name of the module whose line raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def explain_import(kind, error, trace) -> None:
    """Where Python prints a traceback, one line for a package that is missing at the imports of a script."""
    line = explain(error) if issubclass(kind, ModuleNotFoundError) else None
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


sys.excepthook = explain_import
