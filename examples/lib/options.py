"""One spelling of options in all scripts: the name of what they set, with underscores, as transformers' scripts do."""

import argparse
import sys

# Names of earlier releases.
OLD_NAMES = {"--variant": "--nsa_variant"}


class Underscores:
    """For a parser: `--max_tokens` is the option's name, and `--max-tokens` is understood, too.

    Hyphens and `OLD_NAMES` are for callers of earlier releases and go with the next one. --help does not show them.
    """

    def add_argument(self, *names, **kwargs):
        # HfArgumentParser gives an option both spellings.
        return super().add_argument(*dict.fromkeys(map(respell, names)), **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([respell(arg) for arg in args], namespace)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps line breaks of docstrings, and adds defaults to the help of options that do not say theirs."""

    def _get_help_string(self, action):
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            return f"the opposite of --{action.dest}"
        if action.default is None or action.default is False or "(default:" in (action.help or ""):
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class OptionParser(Underscores, argparse.ArgumentParser):
    """The parser of the scripts."""

    def __init__(self, *args, formatter_class=HelpFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)


def add_device(parser: argparse.ArgumentParser, auto: bool = True) -> None:
    """Give a parser the option for the device of a model."""
    import torch  # here: scripts without a model start faster

    others = 'or "auto", which spreads a large model over all GPUs' if auto else "or another one of torch"
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"device of the model: cuda, cpu, {others}")


def respell(argument: str) -> str:
    """An argument of a command line; if it is an option, then in today's spelling."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return OLD_NAMES.get(name, name) + equals + value
