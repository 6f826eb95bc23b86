"""The variables of srun and mpirun: which processes become ranks, are refused, or run alone."""

import re

import pytest

from torchtitan_lite.launch.scheduler import adopt

ADDRESS = {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
SRUN = {  # the second process on the second of two nodes
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
ON_ONE_NODE = {
    **SRUN,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host0-4711@1",
}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FLUX = {"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "3", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2"}
MVAPICH = {name.replace("OMPI_", "MV2_"): value for name, value in OPEN_MPI.items()}
OPEN_MPI_ON_ONE_NODE = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
OF_NO_STEP = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": str(0xFFFF_FFFA), "SLURM_NTASKS": "8"}


def adopted(variables: dict[str, str]) -> tuple[str, str, list[str]]:
    """The rank as RANK/WORLD_SIZE LOCAL_RANK/LOCAL_WORLD_SIZE at ADDRESS:PORT, the notice, the problems."""
    after = dict(variables)
    found = adopt("train.py", after)
    rank = ""
    if "RANK" in after:
        rank = "{RANK}/{WORLD_SIZE} {LOCAL_RANK}/{LOCAL_WORLD_SIZE} at {MASTER_ADDR}:{MASTER_PORT}"
        rank = rank.format(**after)
    return rank, found.notice, [str(problem) for problem in found.problems]


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        (SRUN, "3/5 1/3"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "3/5 1/4"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": ""}, "3/5 1/2"),
        (OPEN_MPI, "3/4 1/2"),
        (MVAPICH, "3/4 1/2"),
        (HYDRA, "3/4 1/2"),
        (FLUX, "3/4 1/2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "0/2 0/1"),
        # mpirun has started one of its parts through srun.
        ({**SRUN, **OPEN_MPI}, "3/4 1/2"),
        ({**SRUN, **HYDRA}, "3/4 1/2"),
        # srun sets PMI_RANK and PMI_SIZE for MPI.
        ({**SRUN, "PMI_SIZE": "4", "PMI_RANK": "0"}, "3/5 1/3"),
    ],
)
def test_with_an_address_each_process_is_a_rank(variables: dict[str, str], rank: str) -> None:
    assert adopted({**variables, **ADDRESS}) == (f"{rank} at host0:29500", "", [])


@pytest.mark.parametrize("variables", [ON_ONE_NODE, OPEN_MPI_ON_ONE_NODE], ids=["srun", "mpirun"])
def test_on_one_machine_the_ranks_need_no_address(variables: dict[str, str]) -> None:
    rank, _, problems = adopted(variables)
    found = re.fullmatch(r"3/4 3/4 at 127\.0\.0\.1:(\d+)", rank)
    assert problems == [] and found is not None
    assert 12_000 <= int(found[1]) < 32_000
    job = next(name for name in ("SLURM_STEP_ID", "PMIX_NAMESPACE") if name in variables)
    assert adopted({**variables, job: "4"})[0] != rank, "another launch has another port"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE = 4 means that mpirun has started 4 processes, and "),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE = 2 means that mpiexec has started 2 processes, and "),
        (
            {"SLURM_PROCID": "1"},
            "SLURM_STEP_NUM_TASKS must be a number from 1 to 1000000, as ",
        ),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "two"}, 'SLURM_STEP_NUM_TASKS = "two" must be a number from 1 to '),
        ({**SRUN, "SLURM_PROCID": "5"}, 'SLURM_PROCID = "5" must be a number from 0 to 4, '),
        ({**SRUN, **ADDRESS, "SLURM_LOCALID": "4"}, 'SLURM_LOCALID = "4" must be a number from 0 to 3, '),
        ({**SRUN, **ADDRESS, "SLURM_LOCALID": "3"}, 'SLURM_LOCALID = "3" is not below 3, '),
        (
            {**SRUN, **ADDRESS, "SLURM_STEP_NUM_NODES": "²"},
            'SLURM_STEP_NUM_NODES = "²" must be ',
        ),
        ({**SRUN, **ADDRESS, "WORLD_SIZE": "8"}, 'WORLD_SIZE = "8" contradicts SLURM_STEP_NUM_TASKS = 5: '),
    ],
)
def test_processes_that_cannot_meet_are_refused(variables: dict[str, str], line: str) -> None:
    rank, notice, (problem,) = adopted(variables)
    assert (rank, notice) == ("", "")
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("variables", "absent", "line"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
            "MASTER_ADDR and MASTER_PORT",
            "srun --nodes NODES --ntasks-per-node 1 torchrun --nnodes NODES --nproc_per_node RANKS_PER_NODE ",
        ),
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "16", "MASTER_ADDR": "host0"},
            "MASTER_PORT",
            "srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id run1 ",
        ),
        (OPEN_MPI, "MASTER_ADDR and MASTER_PORT", "torchrun --nnodes NODES --nproc_per_node RANKS_PER_NODE "),
        (
            {**ON_ONE_NODE, "SLURM_JOB_ID": ""},
            "MASTER_ADDR and MASTER_PORT",
            "torchrun --nproc_per_node 4 train.py",
        ),
    ],
)
def test_the_remedy_is_the_address_or_torchrun(variables: dict[str, str], absent: str, line: str) -> None:
    (problem,) = adopt("train.py", dict(variables)).problems
    assert f"and {absent} do" in problem.rule and problem.rule.endswith(" not say where they meet")
    assert problem.remedy.startswith(f"export {absent}, or start with {line}")
    assert problem.remedy.endswith(" train.py")


@pytest.mark.parametrize(
    ("variables", "local_rank"),
    [
        (SRUN, "3"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, None),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, None),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "x"}, None),
        # Only this process knows that its number is wrong.
        ({**SRUN, "SLURM_PROCID": "5"}, None),
        ({**SRUN, **ADDRESS, "SLURM_LOCALID": "4"}, None),
    ],
)
def test_a_refusal_is_printed_by_each_process_unless_there_surely_is_a_first(variables, local_rank) -> None:
    after = dict(variables)
    assert adopt("train.py", after).problems
    assert after.get("LOCAL_RANK") == local_rank
    assert after.items() - {("LOCAL_RANK", local_rank)} == variables.items()


def test_a_command_of_one_process_says_so() -> None:
    (problem,) = adopt("", dict(OPEN_MPI)).problems
    assert problem.remedy == "start it as one process"


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "8"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77", **ADDRESS},
        {"SLURM_NPROCS": "8"},
        OF_NO_STEP,
    ],
    ids=["salloc", "sbatch", "sbatch with an address", "an old name", "interactive step"],
)
def test_a_process_that_srun_has_not_started_runs_alone_with_a_line(variables: dict[str, str]) -> None:
    rank, notice, problems = adopted(variables)
    assert (rank, problems) == ("", [])
    assert re.match(r"warning: SLURM_N\w+ = 8, but this process is the only one, ", notice)
    assert notice.endswith("start the command with srun or torchrun")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        ADDRESS,
        {**SRUN, "RANK": "0", "WORLD_SIZE": "5"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**SRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["no launcher", "an address", "torchrun", "one task", "a step of one task", "mpirun -n 1"],
)
def test_other_processes_stay_as_they_are(variables: dict[str, str]) -> None:
    before = {name: value for name, value in variables.items()}
    assert not adopt("train.py", before).problems and not adopt("train.py", before).notice
    assert before == variables
