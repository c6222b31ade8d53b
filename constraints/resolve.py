"""Turns the ranges of setup.cfg into versions.

    python3.11 constraints/resolve.py        # `make constraints`: writes the files beside this one
    python constraints/resolve.py --newest   # for `make test-newest`: prints the requirements without upper bounds

`tested.txt` has the newest versions in the ranges, and `oldest.txt` those at which the ranges begin. `extras.txt` has
those of `tested.txt`, or older ones if lmms-eval needs them. Each file also names what its packages need. This script
needs Python and pip alone, and installs nothing.
"""

import argparse
import configparser
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Versions that run on the lowest supported Python run on all: newer Pythons are left out last.
LOWEST_PYTHON = (3, 11)
# Of what is in tested.txt, lmms-eval asks for older versions of these, or what it asks for does.
HELD_BACK = ("av", "filelock", "protobuf")
# Builds of torch name these exactly, and other ones for each platform.
OF_TORCH = re.compile(r"nvidia-|cuda-")
HEAD = """\
# {what}. Written by `make constraints`: do not edit.
# pip install -c constraints/{file} -e ".[{extras}]"
"""


def requirements(*extras: str) -> list[str]:
    """What setup.cfg requires of other packages, with its extras; of what stands there twice, all lines."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return [line for text in lists for line in text.splitlines() if line]


def without_upper_bounds(requirement: str) -> str:
    """`"av>=15,<19"` becomes `"av>=15"`."""
    name, bounds = split(requirement)
    return name + ",".join(bound for bound in bounds if bound.startswith(">="))


def at_lower_bound(requirement: str) -> str:
    """`"av>=15,<19"` becomes `"av==15"`; what has no lower bound stays as it is."""
    name, bounds = split(requirement)
    lowest = [bound.replace(">=", "==") for bound in bounds if bound.startswith(">=")]
    return name + ",".join(lowest or bounds)


def split(requirement: str) -> tuple[str, list[str]]:
    """The name with its extras, and the bounds."""
    name, bounds = re.fullmatch(r"([\w.-]+(?:\[[\w,.-]+\])?)(.*)", requirement).groups()
    return name, [bound.strip() for bound in bounds.split(",") if bound.strip()]


def resolve(wanted: list[str]) -> dict[str, str]:
    """The version of every package that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--quiet"]
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, *wanted], check=True)
        found = json.loads(report.read_text())["install"]
    versions = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in found}
    # Without the local part, such as +cpu, the version names all builds.
    return {name: version.partition("+")[0] for name, version in versions.items() if not OF_TORCH.match(name)}


def write(file: str, what: str, extras: tuple[str, ...], wanted: list[str]) -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(resolve(wanted).items())]
    (HERE / file).write_text(HEAD.format(what=what, file=file, extras=",".join(extras)) + "".join(lines))
    print(f"wrote constraints/{file}: {len(lines)} versions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest", action="store_true", help="print the requirements of tests without upper bounds")
    args = parser.parse_args()

    if args.newest:
        print("\n".join(sorted({without_upper_bounds(requirement) for requirement in requirements("test")})))
        return
    if sys.version_info[:2] != LOWEST_PYTHON:
        lowest = ".".join(map(str, LOWEST_PYTHON))
        sys.exit(f"resolve.py: constraints are those of Python {lowest}: make constraints PYTHON=python{lowest}")
    everything = ("test", "ecosystem")
    write("tested.txt", "The newest tested versions", everything, requirements(*everything))
    oldest = [at_lower_bound(requirement) for requirement in requirements("test")]
    write("oldest.txt", "The oldest supported versions", ("test",), oldest)
    extras = (*everything, "eval")
    tested = [line for line in (HERE / "tested.txt").read_text().splitlines() if not line.startswith("#")]
    same = [line for line in tested if line.partition("==")[0] not in HELD_BACK]
    write("extras.txt", "The tested versions, older where lmms-eval asks for it", extras, requirements(*extras) + same)


if __name__ == "__main__":
    main()
