"""Bugs in hooks and in the loop around a step, for test_mutants.py."""

from mutant import Mutant

HOOKS = "torchtitan_lite/training/hooks/"
TRAINER = "torchtitan_lite/training/trainer.py"
CALLS = "tests/training/hooks/test_hooks.py"
FLAGS = "tests/training/test_step.py"
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
        f"{CALLS}::test_a_hook_that_raises_ends_the_run_with_its_name_and_the_others_hear_of_it[step]",
    ),
    "hooks: a hook that never started is ended": Mutant(
        HOOKS + "__init__.py",
        '            _call(name, hook, "start", self._run)\n            self._started.append((name, hook))\n',
        '            self._started.append((name, hook))\n            _call(name, hook, "start", self._run)\n',
        f"{CALLS}::test_a_hook_that_raises_ends_the_run_with_its_name_and_the_others_hear_of_it[start]",
    ),
    "hooks: the trace of a step holds the validation before it": Mutant(
        HOOKS + "profiler.py",
        "            self._profiler.stop()\n            self._begin(self._step)\n",
        "            pass\n",
        "tests/training/hooks/test_profiler.py::test_every_freqth_step_is_traced_and_no_other[1-traced0]",
    ),
    "hooks: a flag stays on the rank that sets it": Mutant(
        "torchtitan_lite/training/step.py",
        "tuple(count > 0 for count in counts)",
        "tuple(flags())",
        f"{FLAGS}::test_a_flag_that_one_rank_sets_is_set_on_all_and_takes_no_exchange_of_its_own",
    ),
    "hooks: flags are asked for before the forward": Mutant(
        "torchtitan_lite/training/step.py",
        "        start, state = perf_counter(), self.state\n",
        "        start, state, early = perf_counter(), self.state, flags()\n        flags = lambda: early\n",
        f"{FLAGS}::test_flags_are_asked_for_when_the_forward_and_the_backward_are_done",
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
        f"{PREPARE}::test_the_mask_is_of_all_positions_and_the_tensors_are_of_the_share[whole]",
    ),
}
