"""The versions that are allowed, tested and installed agree, wherever they are said."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "constraints"))

import resolve  # noqa: E402

TESTED = ("test", "ecosystem")
EXTRAS = (*TESTED, "eval")
README = (ROOT / "README.md").read_text()


def constraints(name: str) -> dict[str, Version]:
    """The versions in a file of constraints. Each line must be a name and a version."""
    lines = [line for line in (ROOT / "constraints" / name).read_text().splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([a-z0-9-]+)==([0-9][\w.]*)", line) for line in lines]
    assert all(pairs), [line for line, pair in zip(lines, pairs, strict=True) if not pair]
    return {pair[1]: Version(pair[2]) for pair in pairs}


def allowed(*extras: str) -> list[Requirement]:
    return [Requirement(line) for line in resolve.requirements(*extras)]


@pytest.mark.parametrize(
    ("file", "extras"), [("tested.txt", TESTED), ("oldest.txt", ("test",)), ("extras.txt", EXTRAS)]
)
def test_constraints_name_a_version_in_the_range_of_every_requirement(file, extras):
    versions = constraints(file)
    for requirement in allowed(*extras):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)
        for bound in requirement.specifier:
            if file == "oldest.txt" and bound.operator == ">=":
                assert version == Version(bound.version), requirement


def test_the_extras_have_the_tested_versions_but_for_what_is_held_back():
    tested, extras = constraints("tested.txt"), constraints("extras.txt")
    assert tested.keys() <= extras.keys()
    assert {name for name in tested if extras[name] < tested[name]} == set(resolve.HELD_BACK)
    assert all(extras[name] <= tested[name] for name in tested)


def test_a_test_that_needs_more_than_make_test_installs_says_so_by_its_mark():
    """One that skips itself otherwise may never run. Named here are the packages that may be asked for so."""
    installed, left_out = {"gradio", "matplotlib", "qwen_vl_utils", "setuptools", "triton"}, {"deepspeed", "playwright"}
    for path in sorted((ROOT / "tests").glob("*.py")):
        asked = re.findall(r'(?:importorskip|find_spec)\("(\w+)', path.read_text())
        assert {*asked} <= installed | left_out, f"{path.name}: use pytest.mark.needs, which make test-extras chooses"


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_range_ends_with_the_minor_that_is_tested_and_the_readme_says_so(name):
    (requirement,) = (requirement for requirement in allowed() if requirement.name == name)
    (end,) = (Version(bound.version) for bound in requirement.specifier if bound.operator == "<")
    tested = constraints("tested.txt")[name]
    assert (end.major, end.minor) == (tested.major, tested.minor + 1)
    (begin,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    assert re.search(rf"^Supported: .*\b{name} {begin} to {tested.major}\.{tested.minor}\b", README, re.MULTILINE)
    if name == "torch":
        return
    # What the code itself calls tested.
    for path in ROOT.glob("*.py"):
        for said in re.findall(r'^TESTED = \("([\d.]+)", "([\d.]+)"\)$', path.read_text(), re.MULTILINE):
            assert said == (begin, f"{tested.major}.{tested.minor}"), path


def test_the_page_of_the_ecosystem_names_tested_versions():
    tested, oldest = constraints("tested.txt"), constraints("oldest.txt")
    opening = (ROOT / "docs/ecosystem.md").read_text().split("\n| tool |")[0]
    named = re.findall(r"\b(transformers|torch|accelerate|torchao|bitsandbytes)\s(\d+\.\d+\.\d+)", opening)
    assert {name for name, _ in named} >= {"transformers", "torch", "torchao", "bitsandbytes"}
    for name, version in named:
        assert Version(version) in (tested[name], oldest.get(name)), (name, version)


def test_a_model_card_requires_what_setup_cfg_does():
    """It reads the file itself: resolve.py must run before anything is installed, and imports nothing of ours."""
    from lib.card import requirements

    assert requirements("demo") == resolve.requirements("demo")


def test_every_upper_bound_has_its_reason_above_it():
    reasons, ends, above = set(), {}, ""
    for line in (ROOT / "setup.cfg").read_text().splitlines():
        if re.match(r"    [\w.-]+(\[\w+\])?[<>=,.\d]*$", line):
            requirement = Requirement(line.strip())
            if any(bound.operator != ">=" for bound in requirement.specifier):
                ends.setdefault(requirement.name, set()).add(str(requirement.specifier))
                reasons |= {requirement.name} if above.startswith("    # ") else set()
        above = line
    assert {"torch", "transformers", "av", "accelerate", "peft", "gradio", "ruff"} <= set(ends)
    assert reasons == set(ends)
    assert all(len(specifiers) == 1 for specifiers in ends.values()), ends


def test_the_newest_and_the_oldest_requirements_follow_from_the_ranges():
    assert resolve.without_upper_bounds("av>=15,<19") == "av>=15"
    assert resolve.without_upper_bounds("peft<0.22") == "peft"
    assert resolve.without_upper_bounds("transformers[serving]") == "transformers[serving]"
    assert resolve.at_lower_bound("av>=15,<19") == "av==15"
    assert resolve.at_lower_bound("peft<0.22") == "peft<0.22"
    printed = subprocess.run(
        [sys.executable, ROOT / "constraints/resolve.py", "--newest"], capture_output=True, text=True, check=True
    ).stdout
    assert {Requirement(line).name for line in printed.splitlines()} == {x.name for x in allowed("test")}
    assert "<" not in printed and "==" not in printed


def make(*arguments: str) -> str:
    """What make would run."""
    command = ["make", "--dry-run", *arguments]
    # `make test` runs these tests: what a make tells its children would change what they print.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("target", "folder", "extra", "file", "command"),
    [
        ("demo", ".venv", "demo", "tested.txt", "examples/demo.py"),
        ("test", ".venv", "test", "tested.txt", "-m pytest"),
        ("test-oldest", ".venv-oldest", "test", "oldest.txt", "-m pytest"),
    ],
)
def test_make_installs_the_constraints_and_runs_in_that_environment(target, folder, extra, file, command):
    lines = make("--always-make", target).splitlines()
    installs = [line for line in lines if " pip install " in line]
    assert len(installs) == 2
    for line in installs:
        assert line.startswith(f"{folder}/bin/python -m pip install --disable-pip-version-check --quiet --quiet ")
        assert f"--constraint constraints/{file}" in line
    assert f'--no-build-isolation --editable ".[{extra}]"' in installs[1]
    assert lines[-1].startswith(f"{folder}/bin/python ") and command in lines[-1]
    assert any("echo" in line and f"constraints/{file}" in line for line in lines)


def test_make_test_extras_adds_to_the_environment_of_make_test_and_chooses_its_tests():
    lines = make("--always-make", "test-extras").splitlines()
    assert any(".venv/bin/python -m pip install" in line and "constraints/tested.txt" in line for line in lines)
    (path,) = (line for line in lines if line.endswith('/tested.pth"'))
    assert path.startswith(".venv/bin/python ") and ".venv-extras/bin/python" in path
    _, install = (line for line in lines if ".venv-extras/bin/python -m pip install" in line)
    assert "--constraint constraints/extras.txt" in install and f'".[{",".join(EXTRAS)}]"' in install
    assert lines[-1] == ".venv-extras/bin/python -m pytest -m needs"


def test_make_test_newest_takes_what_is_newest_each_time():
    runs = make("test-newest", "TRANSFORMERS=transformers @ https://example.org/main.tar.gz")
    newest, package = re.findall(r"^.*pip install (?:.*\\\n)?.*$", runs, re.MULTILINE)
    assert "--upgrade-strategy eager" in newest and "constraints/resolve.py --newest" in newest
    assert '"transformers @ https://example.org/main.tar.gz"' in newest
    assert "--no-deps" in package and "--constraint" not in runs
    assert ".venv-newest/bin/python -m pytest" in runs.splitlines()[-1]


@pytest.mark.parametrize(
    ("stamp", "file"), [(".venv/test.stamp", "constraints/tested.txt"), (".venv-oldest/test.stamp", "setup.cfg")]
)
def test_an_environment_is_brought_up_to_date_when_its_versions_change(tmp_path, stamp, file):
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    (tmp_path / stamp).parent.mkdir()
    (tmp_path / stamp).touch()

    def is_current() -> bool:
        return subprocess.run(["make", "--question", stamp], cwd=tmp_path, capture_output=True).returncode == 0

    assert is_current()
    later = (tmp_path / stamp).stat().st_mtime + 1
    os.utime(tmp_path / file, (later, later))
    assert not is_current()


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())


def commands(workflow: dict) -> str:
    """What the steps of a workflow run, with the values of its matrix."""
    lines = []
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        targets = [entry.get("target", "") for entry in matrix.get("include", [])] or [""]
        for step in job["steps"]:
            lines += [step.get("run", "").replace("${{ matrix.target }}", target) for target in targets]
    return "\n".join(lines)


def test_pull_requests_are_linted_and_tested_on_the_tested_and_the_oldest_versions():
    tests = workflow("tests")
    assert "pull_request" in tests[True]  # `on` is true in YAML 1.1
    run = commands(tests)
    assert re.search(r"^make test$", run, re.MULTILINE) and "make test-oldest" in run and "make test-extras" in run
    assert "ruff check . && ruff format --check ." in run and "-c constraints/tested.txt ruff" in run


def test_a_schedule_tests_the_newest_versions_and_opens_an_issue_when_they_fail():
    newest = workflow("newest")
    assert newest[True]["schedule"] and newest["permissions"]["issues"] == "write"
    (job,) = newest["jobs"].values()
    transformers = [entry["transformers"] for entry in job["strategy"]["matrix"]["include"]]
    assert transformers[0] == "transformers"
    assert transformers[1].startswith("transformers @ https://github.com/huggingface/transformers/")
    assert "make test-newest" in commands(newest)
    (last,) = (step for step in job["steps"] if step.get("if") == "failure()")
    assert "gh issue create" in last["run"]
    assert not any("continue-on-error" in part for part in (job, *job["steps"]))


def test_ci_runs_lint_and_all_tests_and_stops_at_the_first_failure():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[1] == "set -euo pipefail"
    assert lines[-4:] == ["make lint", "make test", "make test-oldest", "make test-extras"]


def test_every_target_of_a_workflow_is_one_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for target in re.findall(r"^ *make ([\w-]+)", commands(workflow(path.stem)), re.MULTILINE):
            assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), target


def test_cards_ask_for_the_versions_that_setup_cfg_allows(tiny_repository):
    (install,) = re.findall(r"^pip install (.*)$", (tiny_repository / "README.md").read_text(), re.MULTILINE)
    asked = shlex.split(install)
    assert set(asked) <= set(resolve.requirements("demo"))
    assert {Requirement(line).name for line in asked} == {"torch", "torchvision", "transformers", "av", "accelerate"}
