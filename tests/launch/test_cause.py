"""Which rank is named: by errors, and by the counts of process groups that overlap."""

from collections.abc import Mapping
from typing import Literal

import pytest
import world_cases as cases
from ranks import RanksOf

from torchtitan_lite.launch.cause import Answer, find_cause, is_explained
from torchtitan_lite.launch.end import End

# A mesh of 2 x 2: the groups of tensor parallel are 0, 1 and 2, 3; those of data parallel 0, 2 and 1, 3.
TP, DP = ("tp0", "tp0", "tp2", "tp2"), ("dp0", "dp1", "dp0", "dp1")


def answer(
    rank: int,
    reason: Literal["error", "consequence", "signal", "none"] = "none",
    *,
    late: bool = False,
    n: int = 0,
    counts: Mapping[str, int] | None = None,
) -> Answer:
    """The answer of a rank that has entered `n` collectives of one group, or as many as `counts` says."""
    end = End(rank=rank, message="", reason=reason)
    return Answer(end=end, is_late=late, counts=counts or {"all": n})


def mesh(*counts: tuple[int, int]) -> list[Answer]:
    """The answers of four late ranks, each with its counts of its tp and dp groups."""
    return [
        answer(rank, late=True, counts={TP[rank]: tp, DP[rank]: dp}) for rank, (tp, dp) in enumerate(counts)
    ]


@pytest.mark.parametrize(
    ("answers", "announcer", "cause"),
    [
        ([answer(0, n=3), answer(1, "error", n=2)], 1, 1),
        # Rank 0 waited in vain for rank 1, and gloo gave up first.
        ([answer(0, "error", late=True, n=3), answer(1, n=2)], 0, 1),
        ([answer(0, "error", late=True, n=3), answer(1, "error", n=2)], 0, 1),
        # Rank 1 ran ahead of the others, which are on their way, before it failed.
        ([answer(0, n=2), answer(1, "error", n=3), answer(2, n=2)], 1, 1),
        ([answer(0, late=True, n=3), answer(1, n=2), answer(2, late=True, n=3)], 2, 1),
        # In a kernel of a GPU: every rank has entered the same collectives.
        ([answer(0, n=3), answer(1, late=True, n=3), answer(2, n=3)], 1, 1),
        ([answer(0, "signal", n=3), answer(1, "error", n=2)], 0, 1),
        ([answer(0, "signal", n=3), answer(1, n=2)], 0, 0),
        ([answer(0, "consequence", n=3), answer(1, "consequence", n=3), answer(2, "error", n=3)], 0, 2),
        ([answer(0), answer(1, "error"), answer(2, "error")], 2, 2),
        # Rank 3 hangs, 2 waits for it in tp, 0 for 2 in dp, 1 for 0 in tp or for 3 in dp.
        (mesh((5, 5), (5, 5), (5, 4), (4, 4)), 0, 3),
        (mesh((5, 5), (6, 5), (5, 4), (4, 4)), 1, 3),
        (mesh((4, 4), (5, 4), (5, 5), (5, 5)), 3, 0),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(
    answers: list[Answer], announcer: int, cause: int
) -> None:
    assert find_cause(dict(enumerate(answers)), announcer) == cause


def test_a_consequence_alone_explains_nothing() -> None:
    assert not is_explained({0: answer(0, "consequence"), 1: answer(1)})
    assert is_explained({0: answer(0, "consequence"), 1: answer(1, "error")})


@pytest.mark.parametrize("hanging", [0, 1, 3])
def test_counts_of_real_groups_lead_to_the_rank_that_does_not_come(hanging: int, ranks: RanksOf) -> None:
    counts = ranks(4).run(cases.counts_of_a_mesh, hanging)
    answers = {rank: answer(rank, late=True, counts=found) for rank, found in enumerate(counts)}
    assert [find_cause(answers, announcer) for announcer in range(4)] == [hanging] * 4
