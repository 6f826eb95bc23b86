"""torchrun for schedulers: `torchtitan-lite launch` or `python -m torchtitan_lite.launch.torchrun`.

This launcher forwards SIGTERM, SIGUSR1, SIGINT and SIGHUP to the ranks, lets them take as long as they need
to save, and returns the exit status of the ranks. Plain torchrun kills the ranks 30 seconds after a signal,
and ends with a traceback. On a SIGUSR1 it dies and leaves the ranks running. It turns every exit status but 0
into 1. This launcher works on Linux only, because it finds the ranks in /proc.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_lite.launch.output import outlive_reader, protect

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult


def children() -> list[int]:
    """Return the ids of the processes that this process has started: the ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            after_name = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(after_name[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def reason_to_refuse(words: list[str]) -> str:
    """Return the reason why torchrun must not run with the arguments `words`, or "" if there is none."""
    from torch.distributed.run import parse_args

    own = "none of the user's"
    if parse_args(["--signals-to-handle", own, *words]).signals_to_handle != own:
        return "--signals-to-handle is for this launcher to say: leave it out"
    restarts = parse_args(words).max_restarts
    if restarts <= 0:
        return ""
    name = "PET_MAX_RESTARTS" if os.environ.get("PET_MAX_RESTARTS") == str(restarts) else "--max-restarts"
    return (
        f"{name} = {restarts} would start again what was asked to stop: "
        "leave it out, and let the scheduler start the command again"
    )


def outlive_the_store() -> None:
    """Patch torchrun to report how its ranks ended even if the store where the nodes meet is gone.

    The store runs on the first node, which may end before the ranks of other nodes have ended.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousError

    original: Any = LocalElasticAgent._invoke_run

    def invoke_run(agent: Any, *role: str) -> "RunResult":
        try:
            return original(agent, *role)
        except RendezvousError:
            if agent._pcontext is None:  # no rank has started
                raise
            agent._stop_workers(agent._worker_group)
            return agent._monitor_workers(agent._worker_group)

    LocalElasticAgent._invoke_run = invoke_run  # pyright: ignore[reportAttributeAccessIssue]


def main(argv: Sequence[str]) -> int:
    """Handle the signals, run torchrun with `argv`, and return the exit status."""
    protect()
    outlive_reader()  # the ranks have the same reader, and go on
    words, passed_on = list(argv), set[int]()

    def pass_on(number: int, _: object) -> None:
        """Forward a signal to the ranks, or end this process if no rank has started."""
        found = children()
        if not found and not passed_on:
            # An exception in the middle of torch's import would abort the process, so use _exit.
            os._exit(128 + number)
        passed_on.add(number)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # A launcher that ignores SIGHUP, because nohup has started it, has ranks that ignore SIGHUP.
        if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)

    # Not at the top of the file, so that the signals are handled before this slow import.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if why := reason_to_refuse(words):
        print(why, file=sys.stderr)
        return 2
    outlive_the_store()
    try:
        torchrun.main(["--signals-to-handle", "SIGQUIT", *words])
    except ChildFailedError as error:
        # This import takes 0.3 s, and only a run that fails or stops needs it.
        from torchtitan_lite.launch.end import STATUS_STOPPED

        statuses = [failure.exitcode for failure in error.failures.values()]
        if STATUS_STOPPED in statuses:
            return STATUS_STOPPED
        first = error.get_first_failure()[1].exitcode
        status = first if first > 0 else 128 - first
        if status - 128 not in passed_on:  # torchrun's report says nothing new about a signal
            print(error, file=sys.stderr)
        return status
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
