"""Standard output and standard error that cannot be written: full, closed, without a reader, or in ASCII."""

import errno
import io
import json
import logging
import os
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import programs
import pytest
from tqdm import tqdm

from torchtitan_lite import cli, train
from torchtitan_lite.launch import output, torchrun
from torchtitan_lite.launch.end import end_of
from torchtitan_lite.launch.output import ReaderGone, outlive_reader, protect

FULL = "/dev/full" if os.path.exists("/dev/full") else os.devnull
"""A file that refuses writes if it is opened by `refusing`: Linux has a full disk."""
REASON = os.strerror(errno.ENOSPC if FULL == "/dev/full" else errno.EBADF)
LOST = "what is printed there is lost"
GOES_ON = f"{LOST}; the run goes on, and the files in its folder show how"


def refusing() -> int:
    """A new descriptor that no byte can be written to."""
    return os.open(FULL, os.O_WRONLY if FULL == "/dev/full" else os.O_RDONLY)


class Printed(NamedTuple):
    """The files that the two streams write to."""

    out: Path
    err: Path

    def text(self) -> tuple[str, str]:
        """The text on standard output and standard error."""
        sys.stdout.flush()
        sys.stderr.flush()
        return self.out.read_text(), self.err.read_text()


PrintTo = Callable[..., Printed]


@pytest.fixture
def print_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PrintTo]:
    """`print_to(stdout=descriptor)` gives this process streams of its own, to files unless it names others.

    None: the stream was closed when the process started. `encoding` is that of standard output. With
    `by_entry` the test calls an entry of the program, which protects the streams.
    """
    opened = []

    def print_to(
        encoding: str = "utf-8", buffering: int = -1, by_entry: bool = False, **descriptors: int | None
    ) -> Printed:
        printed = Printed(tmp_path / "stdout.txt", tmp_path / "stderr.txt")
        monkeypatch.setattr(output, "_is_outlived", False)
        for name, path in zip(("stdout", "stderr"), printed, strict=True):
            path.touch()
            descriptor = descriptors.get(name, -1)
            if descriptor == -1:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
            stream = None
            if descriptor is not None:
                opened.append(descriptor)
                binary = open(descriptor, "wb", buffering=buffering, closefd=False)  # noqa: SIM115
                words = encoding if name == "stdout" else "utf-8"
                stream = io.TextIOWrapper(binary, encoding=words, write_through=buffering == 0)  # pyright: ignore[reportArgumentType]
            monkeypatch.setattr(sys, name, stream)
            monkeypatch.setattr(sys, f"__{name}__", stream)
        if not by_entry:
            protect()
        return printed

    yield print_to
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    monkeypatch.undo()
    for descriptor in opened:
        os.close(descriptor)


def show(text: str) -> None:
    """Print `text` in every way in which a run prints."""
    print(text)
    tqdm.write(text)
    with tqdm(total=3) as bar:
        bar.update()
    for stream in (sys.stdout, sys.stderr):
        stream.write(text)
        stream.flush()
    handler = logging.StreamHandler()
    handler.handle(logging.makeLogRecord({"msg": text}))


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_a_full_disk_is_said_once_on_the_other_stream(buffering: int, print_to: PrintTo) -> None:
    printed = print_to(buffering=buffering, stdout=refusing())
    for _ in range(3):
        print("x" * 10_000, flush=True)
    assert printed.text() == ("", f"standard output cannot be written ({REASON}): {LOST}\n")


def test_an_unbuffered_stream_stays_unbuffered(print_to: PrintTo) -> None:
    printed = print_to(buffering=0)
    print("at once", end="")
    assert printed.out.read_text() == "at once"


def test_a_full_disk_under_standard_error_is_said_on_standard_output(print_to: PrintTo) -> None:
    printed = print_to(stderr=refusing())
    show("é\n")
    said = f"standard error cannot be written ({REASON}): {LOST}\n"
    assert sorted(printed.text()[0].split("\n")) == sorted(f"{said}é\n\né\n\né\n".split("\n"))


def test_a_stream_that_was_closed_is_said_once_and_only_if_it_is_used(print_to: PrintTo) -> None:
    printed = print_to(stdout=None)
    assert printed.text() == ("", "")
    for _ in range(3):
        print("lost", flush=True)
    assert printed.text() == ("", f"standard output is closed: {LOST}\n")


def test_two_streams_that_cannot_be_written_are_no_error(print_to: PrintTo) -> None:
    print_to(stdout=refusing(), stderr=refusing())
    show("lost")
    print_to(stdout=None, stderr=None)
    show("lost")


def test_a_stream_that_fails_later_may_work_again(print_to: PrintTo, tmp_path: Path) -> None:
    printed = print_to()
    print("before", flush=True)
    descriptor, full = sys.stdout.fileno(), refusing()
    kept = os.dup(descriptor)
    os.dup2(full, descriptor)
    print("lost", flush=True)
    os.dup2(kept, descriptor)
    print("after", flush=True)
    os.close(kept)
    os.close(full)
    assert printed.text() == ("before\nafter\n", f"standard output cannot be written ({REASON}): {LOST}\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
def test_a_character_that_the_encoding_lacks_is_escaped(encoding: str, print_to: PrintTo) -> None:
    printed = print_to(encoding)
    text = "sorties-é \N{CJK UNIFIED IDEOGRAPH-6F22} \N{GRINNING FACE}"
    show(text + "\udcff")
    print(f'path = "{text}"', flush=True)
    lines = printed.out.read_bytes().decode(encoding)
    assert tomllib.loads(lines.splitlines()[-1].rpartition("\\udcff")[2])["path"] == text


def test_a_command_ends_quietly_when_its_reader_has_ended(print_to: PrintTo) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    printed = print_to(stdout=writing)
    with pytest.raises(ReaderGone) as raised:
        print("lost", flush=True)
    end = end_of(raised.value)
    assert (end.status, end.words) == (141, "")
    print("lost", flush=True)
    assert printed.err.read_text() == ""


def test_a_run_goes_on_when_its_reader_has_ended(print_to: PrintTo) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    printed = print_to(stdout=writing)
    outlive_reader()
    for _ in range(3):
        print("lost", flush=True)
    assert printed.text()[1] == f"standard output cannot be written ({os.strerror(errno.EPIPE)}): {GOES_ON}\n"


def test_nothing_ends_when_the_reader_of_standard_error_has_ended(print_to: PrintTo) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    printed = print_to(stderr=writing)
    print("lost", file=sys.stderr)
    said = f"standard error cannot be written ({os.strerror(errno.EPIPE)}): {LOST}\n"
    assert printed.text()[0] == said


def test_a_pipe_that_breaks_elsewhere_is_an_error_like_others() -> None:
    end = end_of(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert end.status == 1 and "BrokenPipeError" in end.words


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(print_to: PrintTo) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    printed, received = print_to(stdout=writing), []

    def read() -> None:
        while part := os.read(reading, 1000):
            received.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    print("x" * 999_999, flush=True)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), writing)  # closes the pipe
    thread.join()
    os.close(reading)
    assert b"".join(received) == b"x" * 999_999 + b"\n"
    assert printed.text()[1] == ""


def test_the_streams_are_otherwise_as_before(print_to: PrintTo, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, writing = os.openpty()
    print_to("latin-1", stdout=writing)
    before = sys.__stdout__
    assert isinstance(before, io.TextIOWrapper) and isinstance(sys.stdout, io.TextIOWrapper)
    assert sys.stdout is not before
    for attribute in ("encoding", "line_buffering", "write_through", "newlines", "closed"):
        assert getattr(sys.stdout, attribute) == getattr(before, attribute)
    assert sys.stdout.fileno() == writing and sys.stdout.isatty() and not sys.stderr.isatty()
    sys.stdout.buffer.write(b"bytes\n")
    sys.stdout.flush()
    assert os.read(terminal, 100) == b"bytes\r\n"
    os.close(terminal)


def test_streams_are_protected_once_and_only_those_of_the_process(
    print_to: PrintTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    print_to(stdout=None)
    protected = sys.stdout, sys.stderr
    protect()
    assert (sys.stdout, sys.stderr) == protected
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        protect()
        assert sys.stderr is stream
    monkeypatch.setattr(sys, "stderr", protected[1])


def test_a_file_never_takes_the_place_of_a_closed_stream() -> None:
    code = (
        "import os, sys\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "sys.stdin = sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None\n"
        "from torchtitan_lite.launch.output import protect\n"
        "protect()\n"
        "assert os.open(sys.argv[1], os.O_WRONLY) > 2\n"
        "assert all(os.get_inheritable(number) for number in (0, 1, 2))\n"
        "os.write(1, b'of a library'); os.write(2, b'of a library'); os.system('echo of a child')\n"
        "print('lost'); sys.exit(3)\n"
    )
    assert programs.run(["-c", code, os.devnull]).returncode == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A run of one step that is saved."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = {
        "job.dump-folder": folder,
        "job.device": "cpu",
        "model.overrides": {"n_layers": 1, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
        "data.dataset": "text",
        "data.path": text_folder,
        "training.steps": 1,
        "training.seq-len": 32,
        "checkpoint.enable": "true",
        "metrics.enable-tensorboard": "false",
    }
    assert train.main(programs.words_of(options)) == 0
    return folder


WITHOUT = {"full": refusing, "closed": lambda: None}


@pytest.mark.parametrize("out", WITHOUT)
@pytest.mark.parametrize("err", ["works", *WITHOUT])
def test_a_run_trains_to_its_end_without_output(
    out: str, err: str, small_run: list[str], tmp_path: Path, print_to: PrintTo
) -> None:
    printed = print_to(
        by_entry=True, stdout=WITHOUT[out](), **({} if err == "works" else {"stderr": WITHOUT[err]()})
    )
    assert train.main(small_run) == 0
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["outcome"] == "done"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    reason = "is closed" if out == "closed" else f"cannot be written ({REASON})"
    said = f"standard output {reason}: {GOES_ON}\n" if err == "works" else ""
    lines = printed.text()[1].splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("tokenized ")) == said


def test_a_run_in_a_folder_whose_name_the_encoding_lacks(
    small_run: list[str], tmp_path: Path, print_to: PrintTo
) -> None:
    folder = tmp_path / "sorties-é"
    printed = print_to("ascii", by_entry=True)
    assert train.main([*small_run, "--job.dump-folder", str(folder)]) == 0
    assert f"Files: {tmp_path}/sorties-\\u00e9\n" in printed.text()[0] and (folder / "exit.json").exists()


@pytest.mark.parametrize("out", WITHOUT)
@pytest.mark.parametrize(
    "command", ["generate", "eval", "export-hf", "models", "attention", "train", "--help"]
)
def test_a_command_does_its_work_without_output(
    command: str, out: str, trained: Path, tmp_path: Path, print_to: PrintTo
) -> None:
    options = {
        "generate": [str(trained), "--max-new-tokens", "2"],
        "eval": [str(trained), "--data", __file__, "--cache-dir", str(tmp_path / "cache")],
        "export-hf": [str(trained), "--out", str(tmp_path / "hf")],
        "train": ["--dry-run"],
    }
    printed = print_to(by_entry=True, stdout=WITHOUT[out]())
    assert cli.main([command, *options.get(command, [])]) == 0
    reason = "is closed" if out == "closed" else f"cannot be written ({REASON})"
    assert printed.text() == ("", f"standard output {reason}: {LOST}\n")


def test_a_dry_run_in_ascii_prints_a_configuration_that_can_be_read(print_to: PrintTo) -> None:
    printed = print_to("ascii", by_entry=True)
    assert train.main(["--dry-run", "--job.dump-folder", "sorties-é"]) == 0
    assert tomllib.loads(printed.text()[0])["job"]["dump_folder"] == "sorties-é"


def test_generated_text_in_ascii_escapes_what_ascii_lacks(trained: Path, print_to: PrintTo) -> None:
    printed = print_to("ascii", by_entry=True)
    assert cli.main(["generate", str(trained), "--prompt", "é", "--max-new-tokens", "1"]) == 0
    assert printed.text()[0].startswith("\\u00e9")


def test_a_refusal_keeps_its_status_and_its_outcome_without_output(
    small_run: list[str], tmp_path: Path, print_to: PrintTo
) -> None:
    print_to(by_entry=True, stdout=None, stderr=None)
    assert train.main([*small_run, "--training.steps", "-1"]) == 2
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["outcome"] == "refused"


def test_the_launcher_refuses_its_input_without_output_and_outlives_its_reader(
    print_to: PrintTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    print_to(by_entry=True, stdout=writing, stderr=refusing())
    assert torchrun.main(["--max-restarts", "1", "train.py"]) == 2
    print("lost", flush=True)


@pytest.mark.parametrize("words", [["models"], ["train", "--training.steps", "-1"]])
def test_the_process_ends_with_the_status_of_its_command(words: list[str]) -> None:
    descriptor = refusing()
    with open(descriptor) as full:
        done = programs.run(["-m", "torchtitan_lite.cli", *words], stdout=full, stderr=full)
    assert done.returncode == (0 if words == ["models"] else 2)


def test_an_error_that_cannot_be_printed_has_status_1() -> None:
    code = "from torchtitan_lite.launch.output import protect; protect(); print('lost'); raise ValueError"
    with open(refusing()) as full:
        assert programs.run(["-c", code], fresh=True, stdout=full, stderr=full).returncode == 1
