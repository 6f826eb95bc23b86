"""Files and folders are there whole or not at all, locks end with their process, and one module does this."""

import ast
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import Program

from torchtitan_lite import durable

PACKAGE = Path(durable.__file__).parent


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fsyncs and renames of a test, in their order: "sync NAME", "rename NAME to NAME"."""
    seen: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        seen.append(f"rename {path.name} to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return seen


def test_a_folder_and_all_in_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, events: list[str]
) -> None:
    built = tmp_path / "parent" / "built"
    (built / "inner").mkdir(parents=True)
    (built / "inner" / "file").write_text("x")
    durable.publish(built, tmp_path / "parent" / "target")
    assert events[-2:] == ["rename built to target", "sync parent"]
    assert sorted(events[:-2]) == ["sync built", "sync file", "sync inner"]
    assert (tmp_path / "parent" / "target" / "inner" / "file").read_text() == "x"


def test_bytes_leave_the_process_when_their_sync_begins(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"some")
        durable.begin_sync(stream, 0, 4)
        assert (tmp_path / "file").read_bytes() == b"some"


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path: Path, events: list[str]) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with durable.replaced(path) as stream:
        stream.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert events == ["sync file.partial", "rename file.partial to file", f"sync {tmp_path.name}"]


def failing_block(path: Path) -> None:
    with durable.replaced(path) as stream:
        stream.write(b"half")
        raise KeyError


def failing_sync(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "no disk")))
        with durable.replaced(path) as stream:
            stream.write(b"all")


@pytest.mark.parametrize("fail", [failing_block, failing_sync])
def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, fail: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises((KeyError, OSError)):
        fail(tmp_path / "file")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_a_new_folder_is_there_when_its_block_has_ended(tmp_path: Path) -> None:
    with durable.new_folder(tmp_path / "a" / "b[1]") as place:
        (place / "x").touch()
        assert not (tmp_path / "a" / "b[1]").exists()
    assert [str(path.relative_to(tmp_path)) for path in (tmp_path / "a").rglob("*")] == ["a/b[1]", "a/b[1]/x"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), durable.new_folder(tmp_path / "out") as place:
        (place / "x").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OSError), durable.new_folder(tmp_path / "out") as place:
        (place / "x").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_folders_that_killed_processes_left_are_removed(tmp_path: Path) -> None:
    for name in ("out.tmp-0123abcd", "other.tmp-0123abcd", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with durable.new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.tmp-0123abcd", "out", "out.tmp"]


# --- locks ---


def test_a_lock_keeps_others_out_and_names_its_owner(tmp_path: Path) -> None:
    with durable.lock(tmp_path / "lock"), pytest.raises(durable.InUse, match=f"^process {os.getpid()} on "):
        durable.lock(tmp_path / "lock")
    durable.lock(tmp_path / "lock").close()
    assert (tmp_path / "lock").read_text().count("process") == 1


def test_the_file_of_a_lock_is_recognised_at_any_time(tmp_path: Path, monkeypatch) -> None:
    path, seen = tmp_path / "lock", []
    assert not durable.is_lock(path)
    for content in ("", "hello", "process one on here\n", "a process 5 on here\n"):
        path.write_text(content)
        assert not durable.is_lock(path)
    durable.lock(path).close()

    def host() -> str:  # is called just before the file is written
        seen.append(durable.is_lock(path))
        return "h"

    monkeypatch.setattr(durable.socket, "gethostname", host)
    durable.lock(path).close()
    assert seen == [True] and durable.is_lock(path)
    assert path.read_text() == f"process {os.getpid()} on h\n"


def test_a_lock_that_will_be_free_is_waited_for(tmp_path: Path) -> None:
    own = durable.lock(tmp_path / "lock")
    threading.Timer(0.2, own.close).start()
    durable.lock(tmp_path / "lock", seconds=20).close()


HOLDER = """
import signal, sys
from pathlib import Path
from torchtitan_lite import durable
held = durable.lock(Path(sys.argv[1]))
print("locked", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Program]:
    """A process that holds the lock of `tmp_path / "lock"`."""
    with Program(["-c", HOLDER, tmp_path / "lock"]) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: Program) -> None:
    with pytest.raises(durable.InUse, match=f"process {holder.pid} on "):
        durable.lock(tmp_path / "lock")
    holder.send_signal(signal.SIGKILL)
    durable.lock(tmp_path / "lock", seconds=20).close()
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def fail_to_lock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.__getitem__
)
def test_a_file_system_without_locks_is_a_warning_unless_a_lock_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    fail_to_lock(monkeypatch, number)
    durable.lock(tmp_path / "lock", required=False).close()
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'lock'}: this file system has no locks ({os.strerror(number)}): ")
    with pytest.raises(OSError, match=os.strerror(number)):
        durable.lock(tmp_path / "lock")


def test_another_failure_to_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_lock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        durable.lock(tmp_path / "lock", required=False)


# --- one module does this ---

CALLS = {"fsync", "fdatasync", "flock", "lockf"}


def uses(source: str) -> set[str]:
    """Return the functions of `CALLS` that a source text names, and fcntl."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {
        alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }
    return names & {*CALLS, "fcntl"}


def test_what_is_looked_for_is_found() -> None:
    assert uses("import os\nos.fsync(1)") == {"fsync"}
    assert uses("from os import fsync as sync\nimport fcntl") == {"fsync", "fcntl"}
    assert uses((PACKAGE / "durable.py").read_text()) == {"fsync", "flock", "fcntl"}


def test_no_other_module_syncs_or_locks() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := uses(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == {"durable.py"}
