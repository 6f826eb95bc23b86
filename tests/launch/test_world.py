"""Ranks that meet, and what they exchange."""

import socket
import time
from pathlib import Path

import pytest
import torch
import world_cases as cases

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.world import World, join, leave, world_size

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets torchrun's variables, or those given in their place; None leaves one out."""

    def set_variables(**changed: str | None) -> None:
        for name, value in {**TORCHRUN, **changed}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    set_variables(**dict.fromkeys(TORCHRUN))
    return set_variables


def test_without_a_launcher_a_run_is_one_rank_without_a_process_group(environment) -> None:
    assert world_size() == 1
    world = join("cpu")
    assert world == World()
    assert world.is_first
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert world.sum(x) is x
    assert x.tolist() == [1, 1]
    assert world.broadcast("folder") == "folder"
    assert world.in_turn(lambda: 3) == 3
    assert [world.any(flag) for flag in (False, True)] == [False, True]
    assert world.saving is world
    assert world.gather(3) == [3] and world.together(lambda: 3) == 3
    world.set_timeout(1)
    leave()


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"RANK": "two"}, 'RANK = "two" must be a number from 0 to 1, '),
        ({"RANK": "-1"}, 'RANK = "-1" must be a number from 0 to 1, '),
        ({"RANK": "2"}, 'RANK = "2" must be a number from 0 to 1, '),
        ({"RANK": None}, "RANK must be a number from 0 to 1, as there are other variables of a launcher: "),
        ({"WORLD_SIZE": "0"}, 'WORLD_SIZE = "0" must be a number from 1 to '),
        ({"WORLD_SIZE": "²"}, 'WORLD_SIZE = "²" must be a number from 1 to '),
        ({"LOCAL_RANK": None}, "LOCAL_RANK must be a number from 0 to 1, "),
        ({"LOCAL_WORLD_SIZE": ""}, 'LOCAL_WORLD_SIZE = "" must be a number from 1 to 2, '),
        ({"MASTER_PORT": None}, 'MASTER_ADDR = "127.0.0.1" did not bring the 2 ranks together ('),
        ({"MASTER_ADDR": None}, "MASTER_ADDR did not bring the 2 ranks together ("),
    ],
)
def test_variables_that_make_no_sense_are_a_line(changed, line: str, environment) -> None:
    environment(**changed)
    with pytest.raises(ConfigError) as raised:
        join("cpu")
    assert str(raised.value).startswith(line)
    assert len(str(raised.value).splitlines()) == 1


def test_more_ranks_than_gpus_are_a_line(environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(CUDA_VISIBLE_DEVICES=None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match=r"^LOCAL_WORLD_SIZE = 2 is more ranks than .* GPUs, which is 1: use "
    ):
        join("cuda")


def test_ranks_that_never_come_are_a_line(environment) -> None:
    environment(MASTER_PORT="0", TORCHELASTIC_USE_AGENT_STORE=None)
    with pytest.raises(
        ConfigError, match=r'^MASTER_ADDR = "127\.0\.0\.1" did not bring the 2 ranks together'
    ):
        join("cpu", init_seconds=1)
    assert not torch.distributed.is_initialized()


def test_a_report_of_progress_is_due_after_the_seconds_that_were_named_last() -> None:
    world = World()
    assert not world.progress.is_late
    for _ in range(2):
        world.alive(-1)
        assert world.progress.is_late and world.saving.progress.is_late
        world.alive(60)
        assert not world.progress.is_late
    world.alive()
    assert 59 < world.progress.due - time.monotonic() <= 60


def test_all_ranks_get_the_sum_and_what_rank_0_has(ranks) -> None:
    assert ranks(4).run(cases.total) == [[4, 6]] * 4
    assert ranks(4).run(cases.broadcast_path) == [Path("of-0")] * 4


@pytest.mark.parametrize(
    "flags", [[False] * 4, [True] * 4, [False, False, True, False], [True, False, False, False]]
)
def test_all_ranks_know_whether_a_flag_is_set_on_any(flags: list[bool], ranks) -> None:
    assert ranks(4).run(cases.any_flag, flags) == [any(flags)] * 4


@pytest.mark.parametrize("machines", [1, 2])
def test_one_rank_of_each_machine_builds_before_the_others(machines: int, ranks, tmp_path: Path) -> None:
    found = ranks(4).run(cases.order_of_turns, tmp_path, machines)
    local_size = 4 // machines
    assert found == [[] if rank % local_size == 0 else [f"{rank // local_size}-0"] for rank in range(4)]


@pytest.mark.parametrize("raising", [[0], [2], [1], [3], [1, 3], [0, 2], [0, 1, 2, 3]])
def test_wrong_input_on_any_rank_is_the_same_on_all(raising: list[int], ranks) -> None:
    first = min((rank for rank in raising if rank in (0, 2)), default=min(raising))
    assert ranks(4).run(cases.error_in_turn, raising, True) == [f"ConfigError: a.b = {first} r: s"] * 4


@pytest.mark.parametrize("raising", [0, 1, 2])
def test_another_exception_stops_all_ranks_and_stays_as_it_is_on_its_own(raising: int, ranks) -> None:
    expected = [f"OnAnotherRank: rank {raising}: KeyError: {raising}"] * 4
    expected[raising] = f"KeyError: {raising}"
    assert ranks(4).run(cases.error_in_turn, [raising], False) == expected


def test_with_a_timeout_a_rank_waits_at_most_the_given_seconds_in_every_group(ranks) -> None:
    waits, _ = ranks(2).run(cases.seconds_of_a_wait, timeout=1000)
    assert len(waits) == 2
    assert all(0.9 < seconds < 60 for seconds in waits)  # and not 1,000, as before the timeout is set


def test_with_a_timeout_a_rank_waits_longer_while_it_saves(ranks) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits, _ = ranks(2).run(cases.waits_of_a_joined_run, port, timeout=1000)
    assert waits[0] > 1.9
    assert 0.9 < waits[1] < 60
