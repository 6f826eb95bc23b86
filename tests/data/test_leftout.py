"""The tally of what a dataset leaves out."""

from pathlib import Path

from torchtitan_lite.data import kinds
from torchtitan_lite.data.leftout import BadByte, LeftOut, percent


def test_each_kind_is_one_line_with_the_largest_files_by_name() -> None:
    left_out = LeftOut()
    for number in range(5):
        left_out.add(kinds.BINARY, f"b{number}", 100 * (number + 1))
        left_out.add(kinds.RUN, f"run{4 - number}")
    left_out.add(kinds.EMPTY, "a\nb\udcff")
    assert left_out.lines() == [
        "5 binary files, 1,500 bytes: b4, b3, b2 and 2 more",
        r"1 empty file: a\nb\udcff",
        "5 run folders: run0, run1, run2 and 2 more",
    ]
    assert left_out.n_lost == 0 and left_out.lines(only_lost=True) == []


def test_only_text_in_another_encoding_is_a_loss(tmp_path: Path) -> None:
    left_out = LeftOut()
    (tmp_path / "x").write_bytes(b"one\ntwo\xe9")
    left_out.add(kinds.BINARY, "b", 1000)
    left_out.add(kinds.UTF_16, "wide", 20)
    left_out.add(kinds.NOT_UTF_8, "x", 8, BadByte(path=tmp_path / "x", offset=7, value=0xE9))
    assert left_out.n_lost == 28
    expected = [
        "1 UTF-16 file, 20 bytes, 20 % of the text: wide",
        "1 non-UTF-8 file, 8 bytes, 8 % of the text: x (byte 0xe9 at offset 7, line 2)",
    ]
    assert left_out.lines(72, only_lost=True) == expected
    assert left_out.lines(72) == [expected[0], "1 binary file, 1,000 bytes: b", expected[1]]
    assert "%" not in "".join(left_out.lines())


def test_a_bad_byte_in_a_file_that_is_gone_still_has_its_offset(tmp_path: Path) -> None:
    assert BadByte(path=tmp_path / "x", offset=1234, value=9).where() == "byte 0x09 at offset 1,234"


def test_the_memory_of_the_tally_is_bounded() -> None:
    left_out = LeftOut()
    for number in range(10_000):
        left_out.add(kinds.EMPTY, str(number))
    assert [len(group.named) for group in left_out._groups.values()] == [3]


def test_a_percentage_has_three_digits() -> None:
    assert [percent(share) for share in (1.0, 0.98361, 0.1, 0.000123456)] == [
        "100 %",
        "98.4 %",
        "10 %",
        "0.0123 %",
    ]
