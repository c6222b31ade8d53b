"""What a repository that scripts write says of its licence and sources, and who may read its files."""

import logging
import os
import shutil

import pytest

from lib import card, conversion


@pytest.fixture
def converted(stock_checkpoint, tmp_path):
    """Converts a stock checkpoint whose card says what is given; returns the new folder."""

    def convert(metadata: str, **options):
        source = shutil.copytree(stock_checkpoint, tmp_path / "source")
        (source / "README.md").write_text(f"---\n{metadata}\n---\n# Source\n")
        return conversion.convert(source, tmp_path / "out", **options)

    return convert


def test_a_source_without_a_licence_is_told(converted, caplog):
    with caplog.at_level(logging.WARNING, logger=card.logger.name):
        caplog.clear()
        folder = converted("tags: [a]")
    (told,) = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    assert told.startswith("The card of ") and "add `license:` at its top" in told
    assert "license" not in (folder / "README.md").read_text().split("---")[1]


def test_a_licence_that_is_stated_is_kept_without_a_word(converted, caplog):
    folder = converted("license: apache-2.0")
    assert not [record for record in caplog.records if "licence" in record.getMessage()]
    assert "license: apache-2.0\n" in (folder / "README.md").read_text()


def test_citations_name_their_authors(converted):
    text = (converted("license: apache-2.0") / "README.md").read_text().split("```bibtex\n")[1]
    videonsa, qwen = text.split("@article{bai2025")
    assert "author  = {Enxin Song and" in videonsa and "Zhuowen Tu}" in videonsa and "Junyang Lin}" in qwen


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(converted, mask):
    before = os.umask(mask)
    try:
        folder = converted("license: apache-2.0")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
