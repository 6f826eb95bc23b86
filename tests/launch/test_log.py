"""Lines for standard output and for log.txt: how they are folded, and files that cannot be written."""

import logging
import sys
import threading
from pathlib import Path

import pytest

from torchtitan_lite.launch import log
from torchtitan_lite.launch.process import show_log

LOG = logging.getLogger("torchtitan_lite.tested")


def write_log(path: Path) -> None:
    log.keep_log(path)
    log.begin_log()


def test_lines_go_to_standard_output_warnings_to_standard_error_and_both_to_the_file(
    tmp_path: Path, capsys
) -> None:
    show_log(is_first=True)
    write_log(tmp_path / "log.txt")
    log.say("step 1")
    LOG.warning("a warning")
    LOG.info("a note")
    log.note("only in the file")
    assert capsys.readouterr() == ("step 1\n", "a warning\na note\n")
    assert (tmp_path / "log.txt").read_text() == "step 1\na warning\na note\nonly in the file\n"


def test_lines_are_shown_also_where_no_log_is_set_up(capsys) -> None:
    log.say("step 1")
    assert capsys.readouterr().out == "step 1\n"


def test_other_ranks_show_no_notes(capsys) -> None:
    show_log(is_first=False)
    LOG.warning("a warning")
    assert capsys.readouterr() == ("", "")


def test_a_later_run_appends_and_another_file_ends_the_one_before(tmp_path: Path) -> None:
    for name, line in (("one", "first"), ("one", "second"), ("two", "third")):
        write_log(tmp_path / name)
        log.say(line)
    log.close_log()
    log.say("nowhere")
    assert (tmp_path / "one").read_text() == "first\nsecond\n"
    assert (tmp_path / "two").read_text() == "third\n"


def test_lines_from_before_the_file_is_opened_are_kept_for_it(tmp_path: Path) -> None:
    log.keep_log(tmp_path / "log.txt")
    log.say("early")
    assert not (tmp_path / "log.txt").exists()
    log.begin_log()
    log.say("late")
    log.begin_log()
    assert (tmp_path / "log.txt").read_text() == "early\nlate\n"


def test_a_line_of_another_thread_waits_until_the_kept_lines_are_written(tmp_path: Path) -> None:
    class Slow:
        thread: threading.Thread | None = None

        def __str__(self) -> str:
            if self.thread and not self.thread.ident:
                self.thread.start()
                self.thread.join(0.2)
            return "first"

    slow = Slow()
    log.keep_log(tmp_path / "log.txt")
    LOG.warning("%s", slow)
    LOG.warning("second")
    slow.thread = threading.Thread(target=LOG.warning, args=["third"])
    log.begin_log()
    slow.thread.join()
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\nthird\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_once_and_ends_nothing(capsys) -> None:
    show_log(is_first=True)
    write_log(Path("/dev/full"))
    for step in range(3):
        log.say(f"step {step}")
    out, err = capsys.readouterr()
    assert out == "step 0\nstep 1\nstep 2\n"
    assert err == ("lines of /dev/full are lost: it cannot be written ([Errno 28] No space left on device)\n")


def test_a_name_that_is_not_utf_8_is_escaped_in_the_file(tmp_path: Path) -> None:
    write_log(tmp_path / "log.txt")
    log.note("folder \udce9")
    assert (tmp_path / "log.txt").read_text() == "folder \\udce9\n"


def test_the_streams_are_those_of_the_moment(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    show_log(is_first=True)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    LOG.warning("a warning")
    assert capsys.readouterr() == ("a warning\n", "")


LONG = "key: " + "word " * 30


def test_long_lines_are_folded_with_an_indent(capsys) -> None:
    log.say(f"short\n{LONG}")
    short, first, *rest = capsys.readouterr().out.splitlines()
    assert short == "short" and first.startswith("key: word")
    assert rest and all(line.startswith("  word") for line in rest)
    assert max(map(len, [first, *rest])) <= 78
    assert " ".join(f"{first} {' '.join(rest)}".split()) == LONG.strip()


@pytest.mark.parametrize("line", ["", "x" * 78, f"in /{'folder/' * 20} and {'word ' * 30}".strip()])
def test_short_lines_and_lines_with_a_path_stay_whole(line: str) -> None:
    assert log.folded(line) == line


def test_a_command_is_not_folded(capsys) -> None:
    log.say(LONG, fold=False)
    assert capsys.readouterr().out == f"{LONG}\n"
