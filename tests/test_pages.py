"""README.md and the pages in docs/ and benchmarks/: links resolve, tables agree with the code, READMEs are short.

That their snippets and commands run is tested in test_hub.py.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

import finetune
from lib import data
from videonsa.configuration_videonsa import NSA_FIELDS, VideoNSATextConfig
from videonsa.processing_videonsa import VideoNSAVideoProcessor

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *DOCS,
    ROOT / "benchmarks/README.md",
    ROOT / "examples/README.md",
    ROOT / "examples/tiny/README.md",
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of each row of the first table under a heading, without the table's own head."""
    section = page.read_text().split(f"\n## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page):
    text = without_code(page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", [*DOCS, ROOT / "benchmarks/README.md"], ids=name)
def test_a_page_opens_with_who_needs_it(page):
    _, title, opening = re.split(r"^# (.+)\n\n", page.read_text(), maxsplit=1)
    assert title and opening.startswith("Read this page ")


def test_every_page_is_linked_from_the_readme():
    links = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()))
    assert {name(page) for page in PAGES} - links == {"README.md"}


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_readmes_have_at_most_900_words(page):
    assert len((ROOT / page).read_text().split()) <= 900


def test_the_page_of_settings_lists_the_fields_of_the_configuration_with_their_defaults():
    rows = table(ROOT / "docs/settings.md", "Fields")
    listed = {field.strip("`"): ast.literal_eval(default.strip("`")) for field, default, _ in rows}
    config = VideoNSATextConfig()
    assert listed == {field: getattr(config, field) for field in NSA_FIELDS}


def test_the_page_of_engines_has_at_most_400_words():
    assert len((ROOT / "docs/engines.md").read_text().split()) <= 400


def test_the_settings_of_videos_are_those_of_the_processor():
    rows = table(ROOT / "docs/videos.md", "Settings")
    listed = {setting for row in rows for setting in re.findall(r"`(\w+)`", row[0])}
    assert listed <= VideoNSAVideoProcessor.valid_kwargs.__annotations__.keys() | {"max_pixels"}
    of_plans = {
        "max_tokens",
        "text_tokens",
        "prefer",
        "fps",
        "num_frames",
        "frame_tokens",
        "block_size",
        "start",
        "end",
    }
    assert of_plans <= listed


def test_the_page_of_fine_tuning_names_options_that_there_are_and_a_record_that_is_taken(tmp_path):
    page = ROOT / "docs/finetuning.md"
    classes = (finetune.ModelArguments, finetune.DataArguments, finetune.FinetuneArguments)
    options = {field.name for arguments in classes for field in dataclasses.fields(arguments)}
    named = {option for row in table(page, "Options") for option in re.findall(r"--(\w+)", row[0])}
    assert named and named <= options

    (example,) = re.findall(r"^```json\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    (record,) = json.loads(example)
    (tmp_path / record["video"]).parent.mkdir()
    (tmp_path / record["video"]).touch()
    messages = data.to_messages(record, tmp_path)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part["type"] for part in messages[0]["content"]] == ["video", "text"]


def test_every_row_of_the_page_of_the_ecosystem_has_a_test_or_says_why_not():
    lines = (ROOT / "docs/ecosystem.md").read_text().split("\n| tool |")[1].split("\n\n")[0].splitlines()[2:]
    for line in lines:
        cell = line.strip("|").split(" | ")[-1]
        files = re.findall(r"`(test_\w+\.py)`", cell)
        assert files or "not tested, because " in cell, line
        assert all((ROOT / "tests" / file).is_file() for file in files), line


def test_the_page_of_the_code_lists_every_file_at_the_top():
    listed = re.findall(r"^\| \[`(\w+\.py)`\]", (ROOT / "docs/code.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py") if path.name != "__init__.py")


def test_what_the_page_of_the_code_names_is_in_the_code():
    folders = (ROOT, *(ROOT / name for name in ("tests", "examples", "examples/lib", "benchmarks")))
    sources = "\n".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    words = re.findall(r"`([\w.]+)`", (ROOT / "docs/code.md").read_text())
    named = {part for word in words if not word.endswith(".py") for part in word.split(".")}
    assert "select_blocks" in named
    assert not [part for part in sorted(named) if not re.search(rf"\b{part}\b", sources)]


def test_the_page_of_kernels_has_every_kernel():
    sources = "\n".join(path.read_text() for path in ROOT.glob("nsa_*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    page = (ROOT / "docs/kernels.md").read_text()
    assert kernels and kernels == set(re.findall(r"`(\w+_kernel)`", page))
    described = {
        name for row in table(ROOT / "docs/kernels.md", "What the kernels compute") for name in row[0].split(", ")
    }
    assert {kernel.strip("`") for kernel in described} == kernels
