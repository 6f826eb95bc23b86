"""docs/attention.md: its table is the data, and its example of a backend is right."""

import re
import sys
import types
from pathlib import Path

import pytest
from attention_cases import EXACT, POSITIONS, QUERIES, compare

from torchtitan_lite.attention import BACKENDS, markdown_table

GUIDE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def test_the_table_of_the_guide_is_printed_from_the_capabilities():
    assert markdown_table(can for backend in BACKENDS for can in backend.supports) in GUIDE


@pytest.fixture(scope="module")
def plain():
    """The module that the guide's example is."""
    (code,) = re.findall(r"^```python\n(from dataclasses import.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    module = types.ModuleType("guide_example")
    sys.modules["guide_example"] = module
    exec(compile(code, "docs/attention.md", "exec"), module.__dict__)  # noqa: S102 the example is what is tested
    yield module
    del sys.modules["guide_example"]


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_backend_of_the_guide_equals_the_reference(plain, positions, queries):
    for window in (None, 7):
        backend = plain.Plain(queries_at_a_time=20)
        compare(backend, POSITIONS[positions], QUERIES[queries], window, 6, 2, 0.37, EXACT)


def test_the_backend_of_the_guide_refuses_an_option_out_of_range(plain):
    assert plain.Plain().option_refusals("cpu") == []
    assert plain.Plain(queries_at_a_time=0).option_refusals("cpu")[0].field == "queries_at_a_time"
