"""The README's measured tables are those of the committed results."""

import re
import sys

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def readme_tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import readme_tables

    return readme_tables


def test_the_tables_are_what_the_results_give(readme_tables):
    for page in readme_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert readme_tables.regenerate(text, page) == text, "run: python benchmarks/readme_tables.py"


@pytest.mark.parametrize(
    ("number", "wrong"),
    [
        (r"4\.001 / 1\.017(?= \| one number per row)", "4.001 / 1.015"),
        (r"(?<=\| 8\.000 \| )\d\.\d{3}(?= \|)", "1.234"),
    ],
)
def test_a_changed_number_is_put_right(readme_tables, number, wrong):
    text = readme_tables.README.read_text(encoding="utf-8")
    changed, count = re.subn(number, wrong, text, count=1)
    assert count == 1
    assert changed != text
    assert readme_tables.regenerate(changed) == text


def test_a_lost_table_or_name_is_an_error(readme_tables):
    text = readme_tables.README.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="each of the tables"):
        readme_tables.regenerate(text.replace("<!-- table: demo -->", ""))
    with pytest.raises(ValueError, match="each optim name once"):
        readme_tables.regenerate(text.replace("| `soap` / `soap_8bit` |", "| `soap` |"))


def test_every_committed_figure_has_its_command():
    told = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "benchmarks" / "results").glob("*.json"), *(ROOT / "benchmarks").glob("*.py")]:
        assert path.name in told, path.name
