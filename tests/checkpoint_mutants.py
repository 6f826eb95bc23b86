"""The bugs that checkpoints must not have, for test_mutants.py."""

from mutant import Mutant

TESTS = "tests/checkpoint/test_"
DAMAGED = "test_the_newest_good_step_is_taken_loudly_and_the_damaged_one_is_kept_aside[a flipped bit]"
PARTS = f"{TESTS}resume.py::test_three_parts_are_the_whole_to_the_bit[one rank, in the background]"
STOP_SAVE = f"{TESTS}stopping.py::test_two_ranks_save_the_same_step_whoever_is_signalled[save-10-signalled3]"
STOP_STEP = f"{TESTS}stopping.py::test_a_run_of_one_process_saves_and_stops[step-15]"

MUTANTS = {
    "checkpoints: a step published over another": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "if os.path.lexists(target):",
        "if False:",
        f"{TESTS}steps.py::test_a_name_that_is_there_is_never_published_over",
    ),
    "checkpoints: old steps removed through a link": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "if self.folder.is_symlink():",
        "if False:",
        f"{TESTS}steps.py::test_nothing_is_removed_where_the_folder_itself_is_a_link",
    ),
    "checkpoints: cleaning through a link": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "if not self.folder.is_dir() or self.folder.is_symlink():",
        "if not self.folder.is_dir():",
        f"{TESTS}steps.py::test_nothing_is_removed_where_the_folder_itself_is_a_link",
    ),
    "checkpoints: a link taken for a step": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "if path.is_dir() and not path.is_symlink()]",
        "if path.is_dir()]",
        f"{TESTS}steps.py::test_files_and_links_are_no_steps_and_stay",
    ),
    "checkpoints: half a step keeps a step's name": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "            self.path(step).rename(doomed)\n            shutil.rmtree(doomed)\n",
        "            shutil.rmtree(self.path(step))\n",
        f"{TESTS}steps.py::test_half_a_step_never_has_a_step_s_name",
    ),
    "checkpoints: what a killed run left stays": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "_SCRATCH.fullmatch(entry.name):",
        "False:",
        f"{TESTS}steps.py::test_what_was_left_is_removed_and_told_and_nothing_else",
    ),
    "checkpoints: reports of steps that were lost stay": Mutant(
        "torchtitan_lite/run_folder.py",
        "            jsonl.cut(path, last, resumed.state.validated)\n",
        "",
        f"{TESTS}resume.py::test_a_validation_that_a_stop_came_before_is_made_up_for",
    ),
    "checkpoints: a manifest that was changed is read": Mutant(
        "torchtitan_lite/checkpoint/manifest.py",
        "if manifest.text().encode() != found:",
        "if False:",
        f"{TESTS}manifest.py::test_every_changed_byte_is_found",
    ),
    "checkpoints: no file is hashed again": Mutant(
        "torchtitan_lite/checkpoint/manifest.py",
        "if found.hexdigest() != digest.sha256:",
        "if False:",
        f"{TESTS}damage.py::test_every_flipped_byte_is_found_and_the_file_named",
    ),
    "checkpoints: a foreign file in a step": Mutant(
        "torchtitan_lite/checkpoint/manifest.py",
        "if name not in manifest.files:",
        "if False:",
        f"{TESTS}damage.py::test_what_does_not_belong_there_is_found",
    ),
    "checkpoints: a damaged step is passed over in silence": Mutant(
        "torchtitan_lite/checkpoint/restore.py",
        "            if world.is_first:\n",
        "            if False:\n",
        f"{TESTS}damage.py::{DAMAGED}",
    ),
    "checkpoints: a damaged step stays in the way": Mutant(
        "torchtitan_lite/run_folder.py",
        "if later := [step for step in steps.named() if step > last]:",
        "if later := []:",
        f"{TESTS}damage.py::{DAMAGED}",
    ),
    "checkpoints: an index with gaps": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        " or not _fill(stored.chunks, stored.shape):",
        ":",
        f"{TESTS}hostile.py::test_an_index_that_is_not_true_of_the_files_is_refused",
    ),
    "checkpoints: an index names bytes of another tensor": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "if (chunk.start, chunk.stop) != layouts[chunk.file].places[name]:",
        "if False:",
        f"{TESTS}hostile.py::test_an_index_that_is_not_true_of_the_files_is_refused",
    ),
    "checkpoints: an index of another file": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "if file not in manifest.files or manifest.files[file].size != wanted.n_bytes:",
        "if file not in manifest.files:",
        f"{TESTS}hostile.py::test_a_file_with_no_tensors_is_refused",
    ),
    "checkpoints: a header is not looked at": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "if stream.read(len(header)) != header:",
        "if False:",
        f"{TESTS}hostile.py::test_a_header_that_differs_from_the_index_is_refused",
    ),
    "checkpoints: whole rows are read where a part of them is wanted": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "    has_whole_rows = list(target.shape[1:]) == row\n",
        "    has_whole_rows = True\n",
        f"{TESTS}tensors.py::test_what_some_ranks_write_others_read_bit_by_bit",
    ),
    "checkpoints: every rank writes what all hold": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "        rank = min(holders[name, box], key=lambda rank: (n_bytes[rank], rank))\n",
        "        rank = holders[name, box][0]\n",
        f"{TESTS}tensors.py::test_what_all_ranks_hold_is_written_once_and_evenly",
    ),
    "checkpoints: a dtype is cast": Mutant(
        "torchtitan_lite/checkpoint/tensors.py",
        "elif not dtypes and stored.dtype != piece.local.dtype:",
        "elif False:",
        f"{TESTS}tensors.py::test_what_differs_is_told_in_a_line_each",
    ),
    "checkpoints: a step is published before it is on the disk": Mutant(
        "torchtitan_lite/checkpoint/steps.py",
        "                    durable.sync(path)\n",
        "                    pass\n",
        f"{TESTS}tensors.py::test_every_file_is_on_the_disk_whole_before_its_step_is_published",
    ),
    "checkpoints: a step is published without its files": Mutant(
        "torchtitan_lite/checkpoint/save.py",
        "            check_files(scratch, manifest)\n",
        "",
        f"{TESTS}saver.py::test_a_step_with_a_file_that_is_not_there_is_not_published",
    ),
    "checkpoints: what cannot be read counts as damaged": Mutant(
        "torchtitan_lite/checkpoint/manifest.py",
        'raise Unreadable(f"{name} cannot be read',
        'raise Damaged(f"{name} cannot be read',
        f"{TESTS}damage.py::test_a_file_that_cannot_be_read_refuses_the_start_and_nothing_else_is_taken",
    ),
    "checkpoints: a rank that writes for long is silent": Mutant(
        "torchtitan_lite/launch/world.py",
        "            self.alive()\n",
        "            pass\n",
        f"{TESTS}saver.py::test_a_rank_gives_signs_of_life_while_one_write_takes_long",
    ),
    "checkpoints: a failure reported instead of a last save": Mutant(
        "torchtitan_lite/training/trainer.py",
        "if after_failure and not self.is_stopping:",
        "if after_failure:",
        f"{TESTS}saver.py::test_a_stop_saves_the_present_step_although_the_one_before_failed",
    ),
    "checkpoints: a batch is left out": Mutant(
        "torchtitan_lite/training/state.py",
        "self.batches.consumed_samples = state.consumed_samples\n",
        "self.batches.consumed_samples = state.consumed_samples + self.batches.n_consumed_each\n",
        PARTS,
    ),
    "checkpoints: a save draws from a generator": Mutant(
        "torchtitan_lite/training/state.py",
        "        found = pieces(self.parameters, optimizer)\n",
        "        found, _ = pieces(self.parameters, optimizer), torch.rand(1)\n",
        PARTS,
    ),
    "checkpoints: the optimizer begins anew": Mutant(
        "torchtitan_lite/training/state.py",
        "self.optimizer if state.step > 0 else None)",
        "None)",
        PARTS,
    ),
    "checkpoints: a validation is done twice": Mutant(
        "torchtitan_lite/training/state.py",
        "state.n_tokens_seen, state.validated\n",
        "state.n_tokens_seen, -1\n",
        PARTS,
    ),
    "checkpoints: all shards at the start of the whole": Mutant(
        "torchtitan_lite/training/record.py",
        "offsets=torch.Size(start for start, _ in box)",
        "offsets=torch.Size(0 for start, _ in box)",
        f"{TESTS}elastic.py::test_a_run_goes_on_on_another_mesh[1, 2, 4 and 1 ranks-True]",
    ),
    "checkpoints: the samples depend on the ranks": Mutant(
        "torchtitan_lite/data/loader.py",
        "first = consumed_samples + self.rank * self.local_batch_size",
        "first = consumed_samples + (3 - self.rank) * self.local_batch_size",
        "tests/data/test_loader.py::test_ranks_and_batch_sizes_cut_one_and_the_same_order",
    ),
    "checkpoints: weights are written while they change": Mutant(
        "torchtitan_lite/checkpoint/save.py",
        'x.to("cpu", copy=True)',
        "x",
        f"{TESTS}saver.py::test_training_goes_on_while_a_copy_is_written",
    ),
    "checkpoints: a save under way is lost": Mutant(
        "torchtitan_lite/training/trainer.py",
        "self.saver.finish()\n",
        "pass\n",
        f"{TESTS}saver.py::test_numbers_that_are_not_finite_keep_the_steps_before",
    ),
    "checkpoints: two runs in a folder": Mutant(
        "torchtitan_lite/durable.py",
        "fcntl.LOCK_EX | ",
        "fcntl.LOCK_SH | ",
        f"{TESTS}start.py::test_a_folder_that_a_run_has_is_refused_to_another",
    ),
    "checkpoints: another run is gone on with": Mutant(
        "torchtitan_lite/checkpoint/identity.py",
        "    if found and not allow_changes:\n",
        "    if False:\n",
        f"{TESTS}start.py::test_another_run_is_refused_with_what_is_and_was[seed]",
    ),
    "checkpoints: a stop request in a save is not seen": Mutant(
        "torchtitan_lite/training/trainer.py",
        "            self.is_stopping = self.is_stopping or self.world.any(self.is_asked())\n",
        "",
        STOP_SAVE,
    ),
    "checkpoints: a stopped run ends with 0": Mutant(
        "torchtitan_lite/run_folder.py",
        "        return end.status\n",
        "        return 0\n",
        STOP_STEP,
    ),
}
