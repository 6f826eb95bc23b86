"""The layout adapter takes only exact names."""

import pytest

from torchtitan_lite.attention import Sdpa, WithLayout


@pytest.mark.parametrize("layout", ["", "b", "bhd", "bsh", "sbh", "hd", "SBHD", "bhsd", "sbhd ", "t", "thdd"])
def test_a_layout_is_compared_by_equality_and_never_by_substring(layout):
    with pytest.raises(ValueError, match=r"bshd.*sbhd.*thd"):
        WithLayout(Sdpa().build(), layout)
