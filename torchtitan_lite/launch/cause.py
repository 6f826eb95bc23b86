"""Which rank is the reason that a run of several ranks ends: the one that the others wait for.

A process group counts its collectives, gloo's as well as NCCL's, and a rank increments its own count when it
enters one. So in each group the ranks with the highest count wait for those that are behind. Groups overlap:
with tensor and data parallel, rank A may hang, B wait for A in one group, and C wait for B in another. All
ranks run the same program, so A is the rank that is behind somewhere and ahead nowhere.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.distributed import distributed_c10d

from torchtitan_lite.launch.end import End
from torchtitan_lite.launch.world import SAVING


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The report of one rank on itself, after a rank has announced trouble."""

    end: End
    """How the run ends if this rank is the cause."""
    is_late: bool
    """Whether its main thread has made no progress for longer than allowed."""
    counts: Mapping[str, int]
    """Collectives entered, by process group."""


def collectives() -> dict[str, int]:
    """How many collectives the main thread has entered in each of its process groups.

    All ranks of a group know it by the same name. Disjoint groups may share a name, so the key has the first
    rank too.
    """
    world, counts = distributed_c10d._world, {}
    for group, name in list(world.pg_names.items()):
        ranks = world.pg_group_ranks.get(group)
        if not ranks or group.group_desc == SAVING:  # being made, or of another thread
            continue
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            key = f"{name} of rank {min(ranks)}"
            counts[key] = group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
    return counts


def is_explained(answers: Mapping[int, Answer]) -> bool:
    """Whether an answer explains the trouble. Otherwise the rank that does has yet to report its error."""
    return any(answer.is_late or answer.end.reason in ("error", "signal") for answer in answers.values())


def find_cause(answers: Mapping[int, Answer], announcer: int) -> int:
    """The rank to name, of those that answer; the announcer where nothing points to another rank."""
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for answer in answers.values():
        for group, n in answer.counts.items():
            counts[group].append(n)

    def differ_from(bound: Callable[[list[int]], int]) -> set[int]:
        return {
            rank
            for rank, answer in answers.items()
            if any(n != bound(counts[group]) for group, n in answer.counts.items())
        }

    ahead, behind = differ_from(min), differ_from(max)
    ranks = sorted(answers, key=lambda rank: (rank in ahead, rank != announcer, rank))
    late = [rank for rank in ranks if answers[rank].is_late]
    errors = [rank for rank in ranks if answers[rank].end.reason == "error"]
    # A rank that waited as long as allowed, and in vain, may have got an error from that.
    failed = [rank for rank in errors if not (rank in late and rank in ahead)]
    waited_for = [rank for rank in ranks if late and rank in behind]
    signalled = [rank for rank in ranks if answers[rank].end.reason == "signal"]
    return [*failed, *waited_for, *late, *signalled, announcer][0]
