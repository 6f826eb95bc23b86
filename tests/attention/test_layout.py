"""The layout adapter takes exact names alone."""

import pytest

from torchtitan_lite.attention import LAYOUTS, Sdpa, WithLayout


@pytest.mark.parametrize("layout", ["", "b", "bhd", "bsh", "sbh", "hd", "SBHD", "bhsd", "sbhd ", "t", "thdd"])
def test_a_layout_is_compared_by_equality_and_never_by_substring(layout):
    with pytest.raises(ValueError, match=r"bshd.*sbhd.*thd"):
        WithLayout(Sdpa().build(), layout)


def test_the_layouts_are_the_three_that_are_documented():
    assert LAYOUTS == ("bshd", "sbhd", "thd")
