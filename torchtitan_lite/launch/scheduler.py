"""Recognise srun and mpirun, which start several processes of one command without torchrun.

Each process becomes a rank: `adopt` translates the variables of the launcher into those of torchrun. If the
variables do not say how the processes meet, the start is refused. Otherwise each process would train a whole
run, side by side with the others. A process of torchrun has RANK, and `adopt` leaves this process as it is.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

from torchtitan_lite.config.load import MISSING, ConfigError, Problem

_NOT_OF_SRUN = 0xFFFF_FFF0
"""Step ids from here on belong to batch scripts and interactive shells (SLURM_BATCH_SCRIPT in slurm.h)."""
_PORTS = range(12_000, 32_000)
"""The ports to meet at. They lie below the ports that systems give to outgoing connections."""
_MOST_TASKS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """A program that starts processes, and the variables that it sets for each process.

    Of several names for one number, the first name that is set counts.
    """

    name: str
    signs: tuple[str, ...]
    """The variables that only this launcher sets."""
    size: tuple[str, ...]
    rank: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()
    n_nodes: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    """The variables that, together, tell a launch from all other launches on a machine."""


_SRUN = _Launcher(
    name="srun",
    signs=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID"),
    size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    rank=("SLURM_PROCID",),
    local_rank=("SLURM_LOCALID",),
    n_nodes=("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
_HYDRA = _Launcher(
    name="mpiexec",
    signs=("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
    size=("PMI_SIZE",),
    rank=("PMI_RANK",),
    local_rank=("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
    local_size=("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE"),
)
# The first launcher of which a variable is set counts. mpirun may start its processes through srun, so that
# they have Slurm's variables too, and srun may set PMI_SIZE.
# https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html
# https://mvapich-docs.readthedocs.io/en/mvapich2/ (MV2_COMM_WORLD_*)
# https://github.com/pmodels/mpich (src/pm/hydra: PMI_*, MPI_LOCALRANKID)
# https://flux-framework.readthedocs.io/projects/flux-core/en/latest/man7/flux-environment.html
# https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
_LAUNCHERS = (
    _Launcher(
        name="mpirun",
        signs=("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        size=("OMPI_COMM_WORLD_SIZE",),
        rank=("OMPI_COMM_WORLD_RANK",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        job=("PMIX_NAMESPACE",),
    ),
    _Launcher(
        name="mpirun",
        signs=("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        size=("MV2_COMM_WORLD_SIZE",),
        rank=("MV2_COMM_WORLD_RANK",),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _HYDRA,
    _Launcher(
        name="flux run",
        signs=("FLUX_TASK_RANK",),
        size=("FLUX_JOB_SIZE",),
        rank=("FLUX_TASK_RANK",),
        local_rank=("FLUX_TASK_LOCAL_ID",),
        n_nodes=("FLUX_JOB_NNODES",),
        job=("FLUX_JOB_ID",),
    ),
    _SRUN,
    replace(_HYDRA, signs=("PMI_SIZE", "PMI_RANK")),
)


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """The result of `adopt`. Both fields are empty if the process may go on without a word."""

    problems: tuple[Problem, ...] = ()
    """The reasons to refuse the start, as several processes run the command and cannot meet."""
    notice: str = ""
    """A line about tasks that the scheduler has allotted and no process uses."""


def adopt(program: str, environ: MutableMapping[str, str] = os.environ) -> Adopted:
    """Make this process a rank if a launcher other than torchrun has started several processes.

    The variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. If the
    start must be refused, LOCAL_RANK is set where the launch is known to have a first process: this process
    prints the refusal for all. But a process whose own number is wrong prints its refusal itself.

    Args:
        program: what torchrun is to start, for the remedy, or "" if the command needs only one process.
    """
    if "RANK" in environ:
        return Adopted()
    launcher = next((one for one in _LAUNCHERS if any(name in environ for name in one.signs)), None)
    if launcher is None:
        return Adopted()
    try:
        if launcher is _SRUN and not _is_of_srun(environ):
            return Adopted(notice=_unused_tasks(environ))
        if variables := _as_rank(launcher, environ, program):
            environ.update(variables)
    except ConfigError as error:
        rank, of_one_process = _text(environ, launcher.rank)[1], {*launcher.rank, *launcher.local_rank}
        is_of_all = of_one_process.isdisjoint(problem.key for problem in error.problems)
        if _job(launcher, environ) and rank.isdecimal() and is_of_all:  # otherwise each process prints it
            environ["LOCAL_RANK"] = rank
        return Adopted(problems=error.problems)
    return Adopted()


def _is_of_srun(environ: Mapping[str, str]) -> bool:
    """Return whether srun has started this process: not a batch script or a shell of salloc."""
    step = environ.get("SLURM_STEP_ID", "")
    if step.isdecimal():
        return int(step) < _NOT_OF_SRUN
    # sbatch sets SLURM_PROCID too, to 0, and SLURM_JOB_ID. A wrapper of srun may keep only some variables.
    is_numbered = {"SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys()
    is_rank = environ.get("SLURM_PROCID", "0") != "0" or (is_numbered and "SLURM_JOB_ID" not in environ)
    return "SLURM_STEP_NUM_TASKS" in environ or is_rank


def _unused_tasks(environ: Mapping[str, str]) -> str:
    """Return a line if Slurm has allotted several tasks to this batch script or shell, otherwise ""."""
    name, given = _text(environ, ("SLURM_NTASKS", "SLURM_NPROCS"))
    if not given.isdecimal() or int(given) < 2:
        return ""
    return (
        f"warning: {name} = {given}, but this process is the only one, and trains alone: "
        "to use all tasks, start the command with srun or torchrun"
    )


def _as_rank(launcher: _Launcher, environ: Mapping[str, str], program: str) -> dict[str, str]:
    """Return torchrun's variables for this process, or none if it is the only one. Raises ConfigError."""
    size = _number(launcher, launcher.size, environ, 1, _MOST_TASKS)
    if size == 1:
        return {}
    rank = _number(launcher, launcher.rank, environ, 0, size - 1)
    n_nodes = _n_nodes(launcher, environ, size)
    address = _address(launcher, environ, n_nodes)
    if address is None:
        raise ConfigError([_refusal(launcher, environ, size, n_nodes, program)])
    local_rank = rank
    if n_nodes != 1 or _text(environ, launcher.local_rank)[1]:
        local_rank = _number(launcher, launcher.local_rank, environ, 0, rank)
    local_size = _local_size(launcher, environ, size, n_nodes)
    if local_size is None:
        local_size = local_rank + 1  # at least so many
    elif local_size <= local_rank:
        name, given = _text(environ, launcher.local_rank)
        rule, remedy = f"is not below {local_size}, the number of tasks on this node", _unset(launcher)
        raise ConfigError([Problem(name, given, rule, remedy)])
    if (other := environ.get("WORLD_SIZE", str(size))) != str(size):
        rule = f"contradicts {_text(environ, launcher.size)[0]} = {size}"
        raise ConfigError([Problem("WORLD_SIZE", other, rule, "unset one of them")])
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {**{name: str(number) for name, number in numbers.items()}, **address}


def _n_nodes(launcher: _Launcher, environ: Mapping[str, str], size: int) -> int | None:
    """Return the number of machines of the launch, or None if the variables do not say it."""
    if launcher.n_nodes and _text(environ, launcher.n_nodes)[1]:
        return _number(launcher, launcher.n_nodes, environ, 1, size)
    if launcher.local_size and _text(environ, launcher.local_size)[1]:
        local_size = _number(launcher, launcher.local_size, environ, 1, size)
        return 1 if local_size == size else None
    return None


def _local_size(
    launcher: _Launcher, environ: Mapping[str, str], size: int, n_nodes: int | None
) -> int | None:
    """Return the number of tasks on this machine, or None if the variables do not say it."""
    if n_nodes == 1:
        return size
    if launcher.local_size and _text(environ, launcher.local_size)[1]:
        return _number(launcher, launcher.local_size, environ, 1, size)
    if launcher is not _SRUN:
        return None
    # Such as 4(x2),3: four tasks on each of two nodes, and three tasks on the third node.
    given, node = environ.get("SLURM_STEP_TASKS_PER_NODE", ""), environ.get("SLURM_NODEID", "")
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", given)
    counts = [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _address(launcher: _Launcher, environ: Mapping[str, str], n_nodes: int | None) -> dict[str, str] | None:
    """Return the variables that say where the ranks meet, or None if that is unknown.

    On one machine the ranks need no address, and the port is a function of the launch, the same on all ranks.
    """
    given = {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environ.get(name)}
    if len(given) == 2:
        return given
    job = _job(launcher, environ)
    if given or n_nodes != 1 or not job:
        return None
    port = _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _job(launcher: _Launcher, environ: Mapping[str, str]) -> str:
    """Return a name of the launch that all its processes know, or "" if the variables do not tell one."""
    values = [environ.get(name, "") for name in launcher.job]
    return ".".join(values) if all(values) else ""


def _refusal(
    launcher: _Launcher, environ: Mapping[str, str], size: int, n_nodes: int | None, program: str
) -> Problem:
    name, given = _text(environ, launcher.size)
    absent = " and ".join(key for key in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(key))
    verb = "do" if " " in absent else "does"
    started = f"means that {launcher.name} has started {size} processes"
    rule = f"{started}, and {absent} {verb} not say where they meet"
    if not program:
        return Problem(name, int(given), rule, "start it as one process")
    if n_nodes == 1:
        line = f"torchrun --nproc_per_node {size} {program}"
    else:
        nodes, per_node = "NODES", "RANKS_PER_NODE"
        if n_nodes is not None:
            nodes = str(n_nodes)
            per_node = str(size // n_nodes) if size % n_nodes == 0 else per_node
        line = (
            f"torchrun --nnodes {nodes} --nproc_per_node {per_node} --rdzv_id run1 --rdzv_backend c10d "
            f"--rdzv_endpoint HOST:29500 {program}"
        )
        if launcher is _SRUN:
            line = f"srun --nodes {nodes} --ntasks-per-node 1 {line}"
    return Problem(name, int(given), rule, f"export {absent}, or start with {line}")


def _text(environ: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    """Return the first of the variables `names` that is set, and its value. The value is "" if none is."""
    return next(((name, environ[name]) for name in names if name in environ), (names[0], ""))


def _number(
    launcher: _Launcher, names: tuple[str, ...], environ: Mapping[str, str], least: int, most: int
) -> int:
    """Return the number in the first of the variables `names` that is set. Raises ConfigError."""
    name, given = _text(environ, names)
    if given.isascii() and given.isdecimal() and least <= int(given) <= most:
        return int(given)
    rule = f"must be a number from {least} to {most}, as there are other variables of {launcher.name}"
    raise ConfigError([Problem(name, given if name in environ else MISSING, rule, _unset(launcher))])


def _unset(launcher: _Launcher) -> str:
    return f"start with {launcher.name} or torchrun, which set it, or unset the variables of {launcher.name}"
