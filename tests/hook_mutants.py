"""Bugs in hooks and in the training loop that the tests must notice, for test_mutants.py."""

from mutant import Mutant

HOOKS = "torchtitan_lite/training/hooks/"
TRAINER = "torchtitan_lite/training/trainer.py"
CALLS = "tests/training/hooks/test_hooks.py"
BOARD = "tests/training/hooks/test_tensorboard.py"
VOTES = "tests/training/test_step.py"
PREPARE = "tests/models/test_prepare.py"

MUTANTS = {
    "hooks: the time of a step lacks the time of hooks": Mutant(
        TRAINER,
        "seconds=stats.seconds + seconds,",
        "seconds=stats.seconds,",
        f"{CALLS}::test_a_slow_hook_shows_in_the_time_of_the_step",
    ),
    "hooks: a failing hook keeps the others from their end": Mutant(
        TRAINER,
        '                    self.hooks.end(Outcome(kind="failed", error=error))\n',
        "                    pass\n",
        f"{CALLS}::test_a_hook_that_raises_ends_the_run_with_its_name_and_the_other_hooks_are_ended[step]",
    ),
    "hooks: a hook that never started is ended": Mutant(
        HOOKS + "__init__.py",
        '            _call(name, hook, "start", self._run)\n            self._started[name] = hook\n',
        '            self._started[name] = hook\n            _call(name, hook, "start", self._run)\n',
        f"{CALLS}::test_a_hook_that_raises_ends_the_run_with_its_name_and_the_other_hooks_are_ended[start]",
    ),
    "hooks: the trace of a step holds the validation before it": Mutant(
        HOOKS + "profiler.py",
        "        if self._stop():\n            self._begin_trace()\n",
        "        pass\n",
        "tests/training/hooks/test_profiler.py::test_every_freqth_step_is_traced_and_no_other[1-traced0]",
    ),
    "hooks: a vote stays on the rank that sets it": Mutant(
        "torchtitan_lite/training/step.py",
        "tuple(count > 0 for count in counts)",
        "tuple(votes())",
        f"{VOTES}::test_a_vote_of_one_rank_is_set_on_all_without_another_exchange",
    ),
    "hooks: votes are read before the forward": Mutant(
        "torchtitan_lite/training/step.py",
        "        start, state = perf_counter(), self.state\n",
        "        start, state, early = perf_counter(), self.state, votes()\n        votes = lambda: early\n",
        f"{VOTES}::test_votes_are_read_after_the_backward",
    ),
    "hooks: a run that has moved begins another run of TensorBoard": Mutant(
        HOOKS + "tensorboard.py",
        "        if earlier:\n            return earlier[0]\n",
        "",
        f"{BOARD}::test_a_resumed_run_keeps_its_name_when_its_folder_has_moved",
    ),
    "hooks: TensorBoard shows repeated steps of a chart with two curves twice": Mutant(
        HOOKS + "tensorboard.py",
        "purge_step=purge_step,",
        "purge_step=None if name else purge_step,",
        f"{BOARD}::test_only_a_resumed_run_has_tensorboard_hide_earlier_points[5-6]",
    ),
    "hooks: a resumed run forgets its earlier starts": Mutant(
        "torchtitan_lite/training/provenance.py",
        "_EARLIER: starts or []}",
        "_EARLIER: (starts or [])[-1:]}",
        "tests/training/test_provenance.py::test_a_resumed_run_keeps_the_facts_of_all_earlier_starts",
    ),
    "prepare: the newest tokens have the mask of the tokens before them": Mutant(
        "torchtitan_lite/inference/generate.py",
        "return ((seq_len - self.n_tokens, seq_len),)",
        "return ((seq_len - self.n_tokens - 1, seq_len - 1),)",
        f"{PREPARE}::test_training_evaluation_and_generation_find_the_same_loss[sdpa]",
    ),
    "prepare: the window of the model does not reach the mask": Mutant(
        "torchtitan_lite/models/decoder.py",
        "            sliding_window=self.config.sliding_window,\n",
        "",
        f"{PREPARE}::test_the_mask_gets_all_positions_and_the_forward_gets_the_tokens_of_the_share[whole]",
    ),
}
