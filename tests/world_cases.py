"""Functions that test_world.py runs on ranks (see ranks.py)."""

import contextlib
import os
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.launch.cause import collectives
from torchtitan_lite.launch.world import World, join


def world(machines: int = 1) -> World:
    """The World of this rank, with the ranks split over `machines`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank=rank, local_rank=rank % (size // machines), size=size)


def total() -> list[float]:
    return world().sum(torch.tensor([1.0, dist.get_rank()])).tolist()


def broadcast_path() -> Path:
    return world().broadcast(Path(f"of-{dist.get_rank()}"))


def order_of_turns(folder: Path, machines: int) -> list[str]:
    """The files that this rank finds in its turn from the first rank of its machine."""
    here = world(machines)
    machine = here.rank * machines // here.size

    def build() -> list[str]:
        found = sorted(path.name for path in folder.glob(f"{machine}-*"))
        time.sleep(0.2 if here.local_rank == 0 else 0)
        (folder / f"{machine}-{here.local_rank}").touch()
        return [name for name in found if name.endswith("-0")]

    return here.in_turn(build)


def error_in_turn(raising: list[int], is_input: bool) -> str:
    """The error on this rank if the ranks in `raising` raise in their turn."""
    here = world(machines=2)

    def build() -> int:
        if here.rank in raising:
            raise ConfigError([Problem("a.b", here.rank, "r", "s")]) if is_input else KeyError(here.rank)
        return 1

    try:
        here.in_turn(build)
    except Exception as error:  # noqa: BLE001 - whichever it is
        return f"{type(error).__name__}: {error}"
    return "nothing"


def seconds_of_a_wait() -> list[float]:
    """The seconds that rank 0 waits in each group for a rank that does not come, given set_timeout(1)."""
    here = world()
    groups = [dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=1000))]
    here.set_timeout(1)
    store = dist.distributed_c10d._get_default_store()
    if not here.is_first:
        store.wait(["waited"])  # stay alive: the end of this rank would end the wait
        return []
    waits = [seconds_until_given_up(group) for group in groups]
    store.set("waited", "")
    return waits


def seconds_until_given_up(group: ProcessGroup | None) -> float:
    """The seconds that this rank waits in a group for a rank that does not come."""
    start = time.monotonic()
    with contextlib.suppress(RuntimeError):
        dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - start


def any_flag(flags: list[bool]) -> bool:
    return world().any(flags[dist.get_rank()])


def waits_of_a_joined_run(port: int) -> list[float]:
    """The seconds that rank 0 waits, given set_timeout(1): for a saving rank, then for an absent rank."""
    here = joined(port)
    here.set_timeout(1)
    assert here.store is not None
    if not here.is_first:
        here.store.wait(["saving"])
        time.sleep(2)
        dist.all_reduce(torch.ones(1), group=here.saving_group)
        here.store.wait(["waited"])  # a rank that is gone would end the wait
        return []
    start = time.monotonic()
    counts = collectives()
    here.store.set("saving", "")
    dist.all_reduce(torch.ones(1), group=here.saving_group)
    assert collectives() == counts, "the main thread does not wait in this group"
    waits = [time.monotonic() - start, seconds_until_given_up(dist.group.WORLD)]
    here.store.set("waited", "")
    return waits


def joined(port: int) -> World:
    """The World of this rank after it has joined a run as under a launcher."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # without it, a rank that leaves could cut off a rank that is still joining
    dist.destroy_process_group()
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    variables = {key: str(value) for key, value in {**numbers, "MASTER_PORT": port}.items()}
    with mock.patch.dict(os.environ, variables, MASTER_ADDR="127.0.0.1"):
        return join("cpu", init_seconds=1000)


def counts_of_a_mesh(hanging: int) -> dict[str, int]:
    """The counts of a rank of a 2 x 2 mesh in which `hanging` enters no collective and the others wait."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rank, peer = dist.get_rank(), {0: 1, 1: 0, 2: 3, 3: 2}
    if rank != hanging:
        dist.all_reduce(torch.ones(1), group=mesh["tp"].get_group(), async_op=True)
        if peer[rank] != hanging:  # else it waits in the first one
            dist.all_reduce(torch.ones(1), group=mesh["dp"].get_group(), async_op=True)
    return collectives()
