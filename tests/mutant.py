"""Bugs that a test must notice, and a server that runs tests on the package with such a bug.

    with Server() as server:
        server.run([mutant.test], mutant).failed  ->  the test, if it failed

The server is a Python that has imported the modules that are slow to import, and nothing of this repository.
For each request the server forks a process, which imports the package with the bug. No file is changed.
"""

import contextlib
import importlib
import json
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import CodeType
from typing import NamedTuple, NoReturn, Self
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]

_SLOW_TO_IMPORT = (
    "pydantic.type_adapter",
    "tensorboard.backend.event_processing.event_accumulator",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor.config",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.nn.attention.flex_attention",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
_NOT_RUN = 99
"""The status if pytest did not run. pytest itself never returns it."""


class Mutant(NamedTuple):
    """A bug: in `file`, `old` becomes `new`. `test` (a node id of pytest) must then fail."""

    file: str
    old: str
    new: str
    test: str

    @property
    def is_there(self) -> bool:
        """Whether the file has the code `old` exactly once."""
        return (ROOT / self.file).read_text().count(self.old) == 1


class Outcome(NamedTuple):
    """How pytest ended."""

    status: int
    output: str
    cpu_seconds: float
    """CPU time of the pytest process. The ranks and programs that it starts are not included."""

    @property
    def failed(self) -> str:
        """The failed test, or "". An error in a module, a fixture or a plugin is not a failed test."""
        found = re.search(r"^FAILED (.+?::.+?)(?: - |$)", self.output, re.MULTILINE)
        return found[1] if found and self.status == pytest.ExitCode.TESTS_FAILED else ""


class Server:
    """Runs tests in forks of a server process, which starts with the first request."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, tests: Sequence[str], mutant: Mutant | None = None) -> Outcome:
        """Run the tests, with the bug if there is one, up to the first that fails."""
        self._process = self._process or _started()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps((tests, mutant)), file=self._process.stdin, flush=True)
            return Outcome(*json.loads(self._process.stdout.readline()))
        except BaseException:
            # A late answer would be read as the answer to the next request.
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the server and its forks."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def _started() -> "subprocess.Popen[str]":
    # With the variables of a pytest-xdist worker, the server's pytest would take itself for a worker.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# --- in the server ------------------------------------------------------------------------------------


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of imports must not mix with answers
    for name in _SLOW_TO_IMPORT:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    resource_tracker.ensure_running()  # one for all forks; otherwise each would start its own
    for line in sys.stdin:
        tests, mutant = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            if not (pid := os.fork()):
                _test(tests, Mutant(*mutant) if mutant else None, Path(folder))
            _, status, used = os.wait4(pid, 0)
            output = (Path(folder) / "output").read_text(errors="replace")
        answer = (os.waitstatus_to_exitcode(status), output, used.ru_utime + used.ru_stime)
        print(json.dumps(answer), file=answers, flush=True)


# --- in a process of its own for each request -----------------------------------------------------------


def _test(tests: Sequence[str], mutant: Mutant | None, folder: Path) -> NoReturn:
    """Run pytest, with the bug if there is one, and end with its status."""
    status = _NOT_RUN
    try:
        _write_to(folder / "output")
        if mutant:
            _put_in(mutant)
        sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
        importlib.import_module("preloaded")
        _start_server_of_forks()
        options = ["-x", "-q", "-o", "timeout=0", f"--basetemp={folder / 'tests'}"]
        plugins = ["--disable-plugin-autoload", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
        status = int(pytest.main([*options, *plugins, *tests]))
    except BaseException:  # noqa: BLE001 (the process ends here)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _write_to(output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _put_in(mutant: Mutant) -> None:
    """Let Python import the file with the bug, even if there is a compiled copy."""
    assert mutant.is_there, mutant
    path, from_file = ROOT / mutant.file, SourceFileLoader.get_code
    source = path.read_text().replace(mutant.old, mutant.new)

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if Path(self.path) == path:
            return compile(source, path, "exec", dont_inherit=True)
        return from_file(self, fullname)

    SourceFileLoader.get_code = get_code


def _start_server_of_forks() -> None:
    """Start multiprocessing's forkserver as a fork of this process, so that it has the bug too.

    Call this before pytest changes the warnings and logs of this process.
    """

    def forked(_: object, words: Sequence[str], kept: Sequence[int]) -> int:
        if pid := os.fork():
            return pid
        try:
            for number in map(int, os.listdir("/proc/self/fd")):
                if number > 2 and number not in kept:
                    with contextlib.suppress(OSError):  # listdir's own file is closed already
                        os.close(number)
            exec(words[-1], {})  # noqa: S102 (the program after -c)
        finally:
            os._exit(0)

    with mock.patch.object(multiprocessing.util, "spawnv_passfds", forked):
        forkserver.ensure_running()


if __name__ == "__main__":
    _serve()
