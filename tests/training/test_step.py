"""The votes that ranks exchange in a step, and the parts of a step beside the loss."""

import math

import parallel_cases as cases
import pytest
import torch
from ranks import RanksOf

from torchtitan_lite.config.job import load_job
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.training.step import NonFinite, check_finite
from torchtitan_lite.training.trainer import Trainer


def test_a_vote_of_one_rank_is_set_on_all_without_another_exchange(ranks: RanksOf, small_run) -> None:
    found = ranks(2).run(cases.agreed_votes, small_run, [(False, False, True), (True, False, True)])
    for (votes, none), (sums, sums_without) in found:
        assert votes == (True, False, True)
        assert none == ()
        assert sums == sums_without == 2  # the count of tokens; the loss, the norm and the votes


def test_votes_are_read_after_the_backward(small_run, monkeypatch) -> None:
    stepper = Trainer(load_job(small_run).config).stepper
    order, loss_of = [], stepper.loss_of
    monkeypatch.setattr(stepper, "loss_of", lambda batch: order.append("forward") or loss_of(batch))
    stats = stepper.train_step(lambda: order.append("votes") or (True,))
    assert order == ["forward", "votes"]
    assert stats.votes == (True,)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "wrong"),
    [(math.nan, 1.0, "the loss of step 7 is nan"), (2.0, math.inf, "the gradient norm of step 7 is inf")],
)
def test_a_number_that_is_not_finite_is_refused_with_step_value_and_samples(loss, grad_norm, wrong) -> None:
    with pytest.raises(NonFinite, match=rf"^{wrong}: .* ids are 24, 25$"):
        check_finite(step=7, loss=loss, grad_norm=grad_norm, sample_ids=[24, 25])


def test_the_work_of_attention_is_measured_only_in_the_first_step(small_run) -> None:
    stepper = Trainer(load_job(small_run).config).stepper
    first, *others = (stepper.train_step().attention_work for _ in range(3))
    assert first is not None and first > 0
    assert others == [None, None]


def test_the_schedule_scales_the_rate_of_each_group(small_run) -> None:
    trainer = Trainer(load_job(small_run).config)
    first, second = trainer.state.optimizer.param_groups
    first["initial_lr"] = 0.0
    before = {name: p.detach().clone() for name, p in trainer.state.parameters.items()}
    rates = []
    for _ in range(2):
        rates.append(trainer.stepper.train_step().lr)
        assert (first["lr"], second["lr"]) == (0.0, rates[-1])
    assert rates[0] != rates[1], "there is a schedule"
    moved = {name for name, p in trainer.state.parameters.items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in before.items() if p.ndim == 1}, "vectors are the second group"


def test_an_optimizer_whose_state_cannot_be_saved_is_refused(small_run) -> None:
    trainer = Trainer(load_job(small_run).config)
    trainer.stepper.train_step()
    trainer.state.check_optimizer("AdamW")
    next(iter(trainer.state.optimizer.state.values()))["n_updates"] = 1
    with pytest.raises(
        ConfigError, match=r'optimizer\.name = "Mine" keeps n_updates in its state, which is no'
    ):
        trainer.state.check_optimizer("Mine")
