"""Forked programs do the same as their command lines do in a fresh Python."""

import signal
from pathlib import Path

import programs
import pytest
from programs import FreshProgram, Program

LINES = {
    "arguments": "import sys; print(sys.argv, __name__, __builtins__ is not None)",
    "folder and variables": "import os; print(os.getcwd(), os.environ.get('HERE'), os.environ.get('RANK'))",
    "a status": "raise SystemExit(75)",
    "a message as status": "import sys; sys.exit('wrong')",
    "an exception": "print('before'); 1 / 0",
    "an interrupt": "raise KeyboardInterrupt",
    "an end by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "handlers": "import signal; print(*map(signal.getsignal, (2, 10, 13, 15, 17)))",
    "exit functions": "import atexit; atexit.register(print, 'end'); print('begin')",
    "a thread at the end": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "open files": "import os; print(sorted(os.listdir('/proc/self/fd')))",
    "a child of a child": "import os, subprocess, sys\n"
    "print(subprocess.check_output([sys.executable, '-c', 'print(3)']), os.waitpid(-1, os.WNOHANG))",
    "multiprocessing": "import multiprocessing as m; print(m.current_process().name, m.parent_process(),\n"
    "m.active_children(), m.get_start_method(allow_none=True))",
    "threads of torch": "import torch; print(torch.get_num_threads())",
}


@pytest.mark.parametrize("name", LINES)
def test_a_forked_program_does_what_a_fresh_one_does(name: str, tmp_path: Path) -> None:
    words = ["-c", LINES[name], "one", "-two"]
    found, wanted = (
        programs.run(words, fresh=fresh, cwd=tmp_path, env=programs.environment(HERE="here"))
        for fresh in (False, True)
    )
    assert (found.stdout, found.stderr) == (wanted.stdout, wanted.stderr)
    assert found.returncode == wanted.returncode


@pytest.mark.parametrize("how", ["script.py", "-m"])
def test_a_script_and_a_module_can_import_files_beside_them(how: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "script.py").write_text(
        "import sys, beside\nprint(__name__, beside.NAME, sys.argv, sys.stdin.read())\n"
    )
    words = ["-m", "script", "one"] if how == "-m" else [how, "one"]
    said = []
    for kind in (Program, FreshProgram):
        program = kind(words, cwd=tmp_path, stdin=programs.PIPE)
        said.append(program.communicate("from the pipe", timeout=60))
        assert program.returncode == 0, said
    assert said[0] == said[1]


def test_a_forked_program_runs_until_a_signal_ends_it(tmp_path: Path) -> None:
    program = Program(["-c", "import time; print('ready', flush=True); time.sleep(1000)"], cwd=tmp_path)
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    assert program.poll() is None
    program.send_signal(signal.SIGKILL)
    assert (program.wait(timeout=60), program.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
    program.communicate()
