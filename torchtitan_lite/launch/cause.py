"""Find the rank that caused a run of several ranks to end: the rank that the others wait for.

A process group counts its collectives, with gloo as well as NCCL. A rank increments its own count when it
enters a collective. So in each group, the ranks with the highest count wait for the ranks with lower counts.
Groups overlap: with tensor and data parallel, rank A may hang while rank B waits for A in one group, and rank
C waits for B in another group. All ranks run the same program, so A is behind in a group and ahead in none.
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
    """The report of one rank about itself. Every rank sends a report when any rank has an error or hangs."""

    end: End
    """The end of the run if this rank is the cause."""
    is_late: bool
    """True if the main thread of the rank has made no progress for longer than allowed."""
    counts: Mapping[str, int]
    """The number of collectives that the rank has entered, by process group."""


def collectives() -> dict[str, int]:
    """Return how many collectives the main thread has entered in each of its process groups.

    The key of a group is its name and its first rank, because disjoint groups may have the same name. The key
    is the same on all ranks of the group.
    """
    world, counts = distributed_c10d._world, {}
    for group, name in list(world.pg_names.items()):
        ranks = world.pg_group_ranks.get(group)
        if not ranks or group.group_desc == SAVING:  # not built yet, or of the saving thread
            continue
        with contextlib.suppress(RuntimeError):  # the backend does not count
            key = f"{name} of rank {min(ranks)}"
            counts[key] = group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
    return counts


def is_explained(answers: Mapping[int, Answer]) -> bool:
    """Return whether an answer explains the trouble. If not, a rank has yet to report its error."""
    return any(answer.is_late or answer.end.reason in ("error", "signal") for answer in answers.values())


def find_cause(answers: Mapping[int, Answer], announcer: int) -> int:
    """Return the rank that caused the trouble: the `announcer`, unless the answers point to another rank."""
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
    # If a rank waited until its timeout, the timeout may have caused the rank's error.
    failed = [rank for rank in errors if not (rank in late and rank in ahead)]
    waited_for = [rank for rank in ranks if late and rank in behind]
    signalled = [rank for rank in ranks if answers[rank].end.reason == "signal"]
    return [*failed, *waited_for, *late, *signalled, announcer][0]
