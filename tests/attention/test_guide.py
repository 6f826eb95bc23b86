"""docs/attention.md: its table is the data."""

from pathlib import Path

from torchtitan_lite.attention import BACKENDS, markdown_table

GUIDE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def test_the_table_of_the_guide_is_printed_from_the_capabilities():
    assert markdown_table(can for backend in BACKENDS for can in backend.supports) in GUIDE
