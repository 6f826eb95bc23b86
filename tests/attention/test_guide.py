"""docs/attention.md: its table is the data."""

from pathlib import Path

from torchtitan_lite.attention import BACKENDS
from torchtitan_lite.attention.capabilities import table

GUIDE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def test_the_table_of_the_guide_is_printed_from_the_capabilities():
    header, *lines = table(can for backend in BACKENDS for can in backend.supports)
    rows = [f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *lines)]
    assert "\n".join(rows) in GUIDE, "\n".join(["the table of docs/attention.md is to be:", *rows])
