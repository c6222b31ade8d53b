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


class OptionParser(Underscores, argparse.ArgumentParser):
    """The parser of the scripts: it keeps the line breaks of their docstrings."""

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)


def respell(argument: str) -> str:
    """An argument of a command line; if it is an option, then in today's spelling."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return OLD_NAMES.get(name, name) + equals + value
