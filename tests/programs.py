"""Runs Python command lines in processes that have already imported torch.

    Program(["-m", "torchtitan_lite.train", "--dry-run"], cwd=folder).communicate()

does the same as subprocess.Popen([sys.executable, ...]). But the process is a fork of a server that has
imported `preloaded`, because a fresh Python takes seconds to import torch. The server is multiprocessing's
forkserver, and ranks.py uses it too. A torchrun that is started in this way forks its ranks from itself.
"""

import atexit
import contextlib
import functools
import gc
import io
import json
import linecache
import multiprocessing
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import _exit_function  # pyright: ignore[reportAttributeAccessIssue]
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
PIPE = subprocess.PIPE
_OPTIONS_OF_POPEN = 23
"""The number of arguments that subprocess.Popen passes to `_execute_child`."""
_MAIN_PROCESS = multiprocessing.current_process()
"""The current process for multiprocessing, in a process that multiprocessing has not started."""
_NOTED: list[Callable[[], object]] = []
"""Exit functions of imported modules, which every program calls at its end."""


@contextlib.contextmanager
def exit_functions_noted() -> Iterator[None]:
    """Note the exit functions that modules register while they are imported in this context."""

    def register(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        _NOTED.append(functools.partial(function, *args, **options))
        return sound(function, *args, **options)

    sound, atexit.register = atexit.register, register
    try:
        yield
    finally:
        atexit.register = sound


def context() -> ForkServerContext:
    """The context of the forked processes. Its server starts with the first process."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    return found


class import_path_in_environment(contextlib.AbstractContextManager[None]):
    """Sets PYTHONPATH so that the server, a new Python, finds our modules when it starts."""

    def __enter__(self) -> None:
        self.before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(place).absolute()) for place in sys.path])

    def __exit__(self, *_: object) -> None:
        del os.environ["PYTHONPATH"]
        if self.before is not None:
            os.environ["PYTHONPATH"] = self.before


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without a launcher's, with `changes`. Empty variables are left out."""
    own = ("RANK", "WORLD_SIZE", "SLURM_", "OMPI_", "PMI", "MPI_", "FLUX_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    changed = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return {key: value for key, value in changed.items() if value}


def words_of(options: Mapping[str, object]) -> list[str]:
    """The words of a command line: {"training.steps": 5} becomes --training.steps 5. A dict becomes JSON."""
    return [
        word
        for key, value in options.items()
        for word in (f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]


class _Forked(subprocess.Popen[str]):
    """A Popen whose process is a fork instead of a fresh Python."""

    def _execute_child(self, args: Sequence[str], *options: Any) -> None:
        assert len(options) == _OPTIONS_OF_POPEN - 1, (
            "Popen of this Python passes other arguments: see its _execute_child"
        )
        cwd, env, pipes, new_session = options[4], options[5], options[9:15], options[20]
        theirs = [pipes[end] for end in (0, 3, 5)]
        self._fork([str(word) for word in args], cwd, env or dict(os.environ), theirs, new_session)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # pyright: ignore[reportAttributeAccessIssue]

    def _fork(
        self, words: list[str], cwd: object, env: Mapping[str, str], streams: list[int], new_session: bool
    ) -> None:
        """Start the process and set `pid`. A stream of -1 is inherited."""
        raise NotImplementedError


class Program(_Forked):
    """A process that does what `python *words` does. Text on pipes unless other streams are given."""

    def __init__(self, words: Sequence[object], *, env: Mapping[str, str] | None = None, **options: Any):
        streams = {"stdout": PIPE, "stderr": PIPE, "text": True, **options}
        super().__init__([str(word) for word in words], env=environment() if env is None else env, **streams)

    def read(self, line: str) -> None:
        """Wait until the process prints `line`, which must be the next one."""
        assert self.stdout is not None and self.stdout.readline() == f"{line}\n"

    def end(self) -> tuple[int, str, str]:
        """Wait for the end, and return the exit status and what the process has printed since."""
        out, err = self.communicate(timeout=200)
        return self.returncode, out, err

    def _fork(
        self, words: list[str], cwd: object, env: Mapping[str, str], streams: list[int], new_session: bool
    ) -> None:
        with open(os.devnull) as nothing:
            inherited = (nothing.fileno(), 1, 2)
            ends = [
                Connection(os.dup(stream if stream >= 0 else own), readable=number == 0, writable=number > 0)
                for number, (stream, own) in enumerate(zip(streams, inherited, strict=True))
            ]
        task = (words, str(cwd or os.getcwd()), dict(env), ends, new_session)
        process = context().Process(target=_forked_by_server, args=task, daemon=True)
        with import_path_in_environment():
            process.start()
        for end in ends:
            end.close()
        assert process.pid is not None
        self._process, self.pid = process, process.pid

    # The server is the parent of the process, so the exit status comes from the server.

    _process: BaseProcess

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        if self.returncode is None:
            self._process.join(0)
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._internal_poll() is None:
            self._process.join(timeout)
            if self._internal_poll() is None:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


class FreshProgram(subprocess.Popen[str]):
    """A Program in a fresh Python, as a user starts it: for tests of how a process starts."""

    def __init__(self, words: Sequence[object], *, env: Mapping[str, str] | None = None, **options: Any):
        streams = {"stdout": PIPE, "stderr": PIPE, "text": True, **options}
        command = [sys.executable, *map(str, words)]
        super().__init__(command, env=environment() if env is None else env, **streams)


class RankOfTorchrun(_Forked):
    """Replaces the Popen with which torchrun starts a rank: `python -u script ...`."""

    def _fork(
        self, words: list[str], cwd: object, env: Mapping[str, str], streams: list[int], new_session: bool
    ) -> None:

        def fork() -> None:
            if pid := os.fork():
                self.pid = pid
                return
            # Garbage collection in the fork must not close the store, which torchrun still uses.
            gc.freeze()
            ends = [own if stream < 0 else stream for own, stream in enumerate(streams)]
            _become(words[1:], str(cwd or os.getcwd()), env, ends, new_session)

        # The thread that forks becomes the main thread of the new process. A rank that hangs prints
        # the stack of its main thread, which must not have torchrun's frames.
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()


def run(words: Sequence[object], fresh: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return its status and its output."""
    program = (FreshProgram if fresh else Program)(words, **options)
    try:
        out, err = program.communicate()
    except BaseException:
        program.kill()
        raise
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


# --- in the forked process ----------------------------------------------------------------------------


def _forked_by_server(
    words: list[str], cwd: str, env: dict[str, str], streams: list[Connection], new_session: bool
) -> NoReturn:
    _become(words, cwd, env, [stream.fileno() for stream in streams], new_session)


def _become(
    words: list[str], cwd: str, env: Mapping[str, str], streams: Sequence[int], new_session: bool
) -> NoReturn:
    """Do the same as `python *words`, and end with its exit status."""
    status = 1
    try:
        if new_session:
            os.setsid()
        for number, stream in enumerate([os.dup(stream) for stream in streams]):
            os.dup2(stream, number)
        _forget_the_parent()
        os.chdir(cwd)
        multiprocessing.process.ORIGINAL_DIR = cwd  # pyright: ignore[reportAttributeAccessIssue]
        os.environ.clear()
        os.environ.update(env)
        is_unbuffered = "-u" in words[:1] or bool(env.get("PYTHONUNBUFFERED"))
        _open_streams(is_unbuffered)
        _compute_in(env.get("OMP_NUM_THREADS"))
        _tell_launcher()
        status = _status_of(words[1:] if "-u" in words[:1] else words)
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001 (as Python's own end would)
        traceback.print_exc()
        status = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _forget_the_parent() -> None:
    """Remove everything that the parent left: open files, signal handlers, children, exit functions."""
    for number in os.listdir("/proc/self/fd"):
        if int(number) > 2:
            with contextlib.suppress(OSError):  # listdir's own file is closed already
                os.close(int(number))
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # Even if the shell that started the tests ignores SIGINT, or nohup has started the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    atexit._clear()
    for function in (_exit_function, *_NOTED):
        atexit.register(function)
    _forget_multiprocessing(multiprocessing.process, resource_tracker, forkserver)


def _forget_multiprocessing(process: Any, resource_tracker: Any, forkserver: Any) -> None:
    """Reset the state of these modules to that of a process that is not a fork."""
    _MAIN_PROCESS.name = "MainProcess"
    process._parent_process, process._current_process, process._children = None, _MAIN_PROCESS, set()
    multiprocessing.set_start_method(None, force=True)
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    forkserver._forkserver = forkserver.ForkServer()


def _open_streams(unbuffered: bool) -> None:
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _stream(1, "strict", write_through=unbuffered)
    sys.stderr = _stream(2, "backslashreplace", write_through=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _stream(number: int, errors: str, write_through: bool) -> IO[str]:
    file = open(number, "wb", buffering=0 if write_through else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(file, encoding="utf-8", errors=errors, write_through=write_through)  # pyright: ignore[reportArgumentType]


def _compute_in(n_threads: str | None) -> None:
    """Set torch's threads from OMP_NUM_THREADS, which torch reads only when it is imported."""
    import torch

    torch.set_num_threads(int(n_threads) if n_threads else len(os.sched_getaffinity(0)))


def _status_of(words: list[str]) -> int:
    """The exit status of a Python command line: a script, -m module or -c code."""
    try:
        _run(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        _show(error)
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:  # noqa: BLE001 (Python shows any exception and fails)
        _show(error)
        return 1
    return 0


def _show(error: BaseException) -> None:
    """A traceback without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    sys.excepthook(type(error), error.with_traceback(frames), frames)


def _run(words: list[str]) -> None:
    how, *rest = words
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if how == "-m":
        sys.argv = rest
        sys.path[:0] = [os.getcwd(), *own]
        sys.modules.pop(rest[0], None)
        runpy._run_module_as_main(rest[0])  # pyright: ignore[reportAttributeAccessIssue]
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[:0] = ["", *own]
        code = compile(rest[0], "<string>", "exec")
        if sys.version_info >= (3, 13):  # tracebacks show the lines of -c
            lines = rest[0].splitlines(keepends=True)
            linecache.cache["<string>"] = (len(rest[0]), None, lines, "<string>")
        exec(code, main.__dict__)  # noqa: S102 (as -c does)
    else:
        assert not how.startswith("-"), f"this option of Python is not implemented: {how}"
        sys.argv = words
        sys.path[:0] = [str(Path(how).resolve().parent), *own]
        main.__dict__.update(__file__=how, __cached__=None)
        exec(compile(Path(how).read_bytes(), how, "exec"), main.__dict__)  # noqa: S102 (as Python does)


def _tell_launcher() -> None:
    """Set the launcher's process id: the package was imported in the server, which has another parent."""
    from torchtitan_lite.launch import process

    process._launcher = os.getppid()
