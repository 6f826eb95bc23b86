"""docs/checkpoints.md: each fault of its table names a test that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_of_the_guide_names_a_test_that_is_there() -> None:
    guide = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = guide.partition("## Faults")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    named = [
        re.search(r"`((?:\.\./\w+/)?\w+\.py)::(test_\w+)` \|$", row) for row in rows if "|---" not in row
    ]
    assert len(named) >= 20
    for row, found in zip(rows, named, strict=True):
        assert found, row
        assert f"def {found[2]}(" in (Path(__file__).parent / found[1]).read_text(encoding="utf-8"), row
