"""What the ranks tell each other in the step's one sum, beside the loss and the norm."""

import parallel_cases as cases
from ranks import RanksOf

from torchtitan_lite.config.job import load_job
from torchtitan_lite.training.trainer import Trainer


def test_a_flag_that_one_rank_sets_is_set_on_all_and_takes_no_exchange_of_its_own(
    ranks: RanksOf, small_run
) -> None:
    found = ranks(2).run(cases.agreed_flags, small_run, [(False, False, True), (True, False, True)])
    for (flags, none), (sums, sums_without) in found:
        assert flags == (True, False, True)
        assert none == ()
        assert sums == sums_without == 2  # the count of tokens; the loss, the norm and the flags


def test_flags_are_asked_for_when_the_forward_and_the_backward_are_done(small_run, monkeypatch) -> None:
    stepper = Trainer(load_job(small_run).config).stepper
    order, loss_of = [], stepper.loss_of
    monkeypatch.setattr(stepper, "loss_of", lambda batch: order.append("forward") or loss_of(batch))
    stats = stepper.train_step(lambda: order.append("flags") or (True,))
    assert order == ["forward", "flags"]
    assert stats.flags == (True,)


def test_the_work_of_attention_is_measured_in_the_first_step_alone(small_run) -> None:
    stepper = Trainer(load_job(small_run).config).stepper
    first, *others = (stepper.train_step().attention_work for _ in range(3))
    assert first is not None and first > 0
    assert others == [None, None]
