"""Each mutant puts a bug into the package, and the test that the mutant names must fail.

`python tests/test_mutants.py` prints which test noticed each bug, and the CPU time.
"""

from collections.abc import Iterator

import checkpoint_mutants
import hook_mutants
import hub_mutants
import pytest
from mutant import Mutant, Server

ATTENTION = "torchtitan_lite/attention/"
PARALLEL = "torchtitan_lite/parallel/"
STEP = "torchtitan_lite/training/step.py"
ORACLE = "tests/attention/test_oracle.py"
NORMAL = "tests/models/test_init.py::test_any_part_is_that_part_of_the_whole_bit_by_bit"
WHOLE, LAST, PACKED, LOOP = (
    f"{ORACLE}::test_every_backend_equals_the_reference_for_every_mask[{case}]"
    for case in (
        "sdpa-one document-all",
        "sdpa-one document-the last one",
        "sdpa-packed-all",
        "varlen-one document-all",
    )
)
VARLEN = f"{ORACLE}::test_packs_give_the_numbers_of_the_reference[one document-all]"
FLEX = f"{ORACLE}::test_the_block_mask_gives_the_numbers_of_the_reference"
ONE_CALL = f"{ORACLE}::test_the_one_call_of_rows_of_one_document_equals_the_reference[6-6]"
COPIES = "tests/attention/test_memory.py::test_the_fused_path_neither_copies_nor_repeats_forward_or_backward"
DECODER = "tests/models/test_decoder.py"
TRAINING = "tests/training/test_trainer.py"
CONTEXT, TENSOR, GRADIENTS, RECOMPUTE = (
    f"tests/parallel/test_{name}.py" for name in ("context", "tensor", "gradients", "recompute")
)
IN_PARTS = f"{CONTEXT}::test_attention_in_parts_equals_the_reference_on_the_whole[allgather, headtail-sdpa-2]"
LOSS = f"{TENSOR}::test_the_loss_in_shares_equals_the_whole_loss_and_so_do_its_gradients[of the vocabulary-2]"
GRID = "tests/parallel/test_grid.py::test_n_ranks_train_as_one_does"
FSDP_2, CP_2, TP_2 = (
    f"{GRID}[float64-{cell}]"
    for cell in ("weights kept until the backward", "sliding window, sdpa", "no loss parallel, tied")
)

PORTABLE_VARLEN = "        return attend(q_BQHK, k_BSGK, v_BSGK, mask, scale)\n"
HOW = "pack.max_q, pack.max_k, work.window, work.scale)"
HEADS_FIRST = "(x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))"
REPEATED = HEADS_FIRST.replace(" for", ".repeat_interleave(q_BSHK.shape[2] // x.shape[2], 1) for")
SUMMED_KEYS = "reduce_scatter(chunks.by_rank(x_BSGK), 0, group)"
GATHERED_KEYS = "        both = torch.cat([k_BsGK, v_BsGK])\n"
PREPARED = "torchtitan_lite/models/decoder.py"
ON_DEVICE = "return tokens_BS, positions_BS, mask, labels_BS"
MUTANTS = {
    **checkpoint_mutants.MUTANTS,
    **hook_mutants.MUTANTS,
    **hub_mutants.MUTANTS,
    "varlen: an extra transpose of the loop's output, hidden by a view": Mutant(
        ATTENTION + "varlen.py",
        PORTABLE_VARLEN,
        PORTABLE_VARLEN.replace("scale)", "scale).transpose(2, 3).reshape(q_BQHK.shape)"),
        LOOP,
    ),
    "varlen: an extra transpose of the kernel's output, hidden by a view": Mutant(
        ATTENTION + "packs.py",
        "return out_THK.unflatten(0, q.shape[:2])",
        "return out_THK.transpose(1, 2).reshape(q.shape)",
        VARLEN,
    ),
    "varlen: the scale does not reach the kernel": Mutant(
        ATTENTION + "packs.py",
        HOW,
        HOW.replace("work.scale", "tensors[0].shape[-1] ** -0.5"),
        VARLEN,
    ),
    "varlen: the window does not reach the kernel": Mutant(
        ATTENTION + "packs.py", HOW, HOW.replace("work.window", "None"), VARLEN
    ),
    "all backends: the scale that is given is dropped": Mutant(
        ATTENTION + "mask.py", "** -0.5 if scale is None else scale", "** -0.5", WHOLE
    ),
    "sdpa: the scale does not reach the kernel": Mutant(
        ATTENTION + "sdpa.py", "is_causal=True, scale=scale,", "is_causal=True,", ONE_CALL
    ),
    "flex: the scale does not reach the kernel": Mutant(
        ATTENTION + "flex.py", "            scale=scale,\n", "", FLEX
    ),
    "causality of short queries aligned at the top left": Mutant(
        ATTENTION + "portable/tiles.py",
        "    diagonal = k1 - (q1 - q0)\n",
        "    diagonal, k1 = k0, k0 + (q1 - q0)\n",
        LAST,
    ),
    "keys sliced by the queries' length": Mutant(
        ATTENTION + "mask.py",
        "q1 - first + offset, start, q1]",
        "q1 - first + offset, q0, q1]",
        LAST,
    ),
    "documents leak, in the segments": Mutant(
        ATTENTION + "mask.py",
        "q1 - first + offset, start, q1]",
        "q1 - first + offset, start * 0, q1]",
        PACKED,
    ),
    "documents leak, in the intervals": Mutant(
        ATTENTION + "mask.py", "first_BS = index_S - positions_BS", "first_BS = positions_BS * 0", PACKED
    ),
    "a window one token too long, in the tiles": Mutant(
        ATTENTION + "portable/tiles.py",
        ".triu().tril(work.window - 1)",
        ".triu(-1).tril(work.window - 1)",
        WHOLE,
    ),
    "a window one token too long, in the intervals": Mutant(
        ATTENTION + "mask.py", "index_S - (sliding_window - 1)", "index_S - sliding_window", WHOLE
    ),
    "tiles of the same queries overwrite each other": Mutant(
        ATTENTION + "portable/tiles.py", "if not tile.fresh_queries:", "if False:", LAST
    ),
    "gradients of shared keys overwrite each other": Mutant(
        ATTENTION + "portable/tiles.py", "if is_first:", "if True:", WHOLE
    ),
    "block size of flex dropped on the way to the mask": Mutant(
        ATTENTION + "flex.py",
        "queries, sliding_window, self.blocks, device)",
        "queries, sliding_window, (128, 128), device)",
        "tests/attention/test_capabilities.py::test_the_mask_of_flex_has_its_block_size",
    ),
    "keys and values repeated to all heads": Mutant(ATTENTION + "sdpa.py", HEADS_FIRST, REPEATED, COPIES),
    "a copy into another layout before the kernel": Mutant(
        ATTENTION + "sdpa.py",
        HEADS_FIRST,
        HEADS_FIRST.replace(" for", ".contiguous() for"),
        COPIES,
    ),
    "keys and values repeated before they reach the backend": Mutant(
        "torchtitan_lite/models/decoder.py",
        "out_BSHK = self.inner(q_BSHK, k_BSGK, v_BSGK, mask)",
        "n = q_BSHK.shape[2] // k_BSGK.shape[2]; out_BSHK = self.inner(q_BSHK, "
        "k_BSGK.repeat_interleave(n, 2), v_BSGK.repeat_interleave(n, 2), mask)",
        f"{DECODER}::test_the_attention_path_copies_nothing_forward_or_backward[llama3-sdpa]",
    ),
    "an extra transpose of the attention's output in the decoder, hidden by a view": Mutant(
        "torchtitan_lite/models/decoder.py",
        "self.wo(out_BSHK.flatten(2))",
        "self.wo(out_BSHK.transpose(2, 3).flatten(2))",
        f"{DECODER}::test_loss_and_gradients_equal_those_of_an_independent_decoder[None-llama3-sdpa]",
    ),
    "a label across the end of a document": Mutant(
        "torchtitan_lite/data/batch.py",
        "        labels[breaks - 1] = IGNORE\n",
        "",
        "tests/data/test_batch.py::test_samples_equal_the_slow_reference",
    ),
    "each micro-batch divided by its own count of tokens": Mutant(
        STEP,
        "(loss_sum / n_valid).backward()",
        "(loss_sum / (batch.labels_BS != IGNORE).sum() / len(micro)).backward()",
        f"{TRAINING}::test_loss_and_gradients_are_those_of_the_mean_over_all_valid_tokens",
    ),
    "the weights change before a number is known to be finite": Mutant(
        STEP,
        "        check_finite(step=state.step + 1,",
        "        state.optimizer.step(); check_finite(step=state.step + 1,",
        f"{TRAINING}::test_a_number_that_is_not_finite_stops_the_run_before_the_weights_change",
    ),
    "a plugin takes the place of a member of ours": Mutant(
        "torchtitan_lite/registry.py",
        "elif name in self.reserved or not _is_same(",
        "elif name in self.reserved and not _is_same(",
        "tests/test_registry.py::test_a_taken_name_is_refused_and_its_member_stays",
    ),
    "the shards of a plugin's dataset are those of other options": Mutant(
        "torchtitan_lite/data/shards.py",
        "source.digest, config.shard_options,",
        "source.digest, None,",
        "tests/data/test_datasets.py::test_the_shards_of_a_plugins_dataset_depend_on_its_own_options",
    ),
    "a changed tag drops options that both members have": Mutant(
        "torchtitan_lite/config/validation.py",
        "if name not in old or (name in new and plain_types(old[name]) == plain_types(new[name]))",
        "if name not in old",
        "tests/config/test_plugins.py::test_a_changed_tag_keeps_what_both_members_have_and_drops_the_rest",
    ),
    "norms decay like matrices": Mutant(
        "torchtitan_lite/training/optimizer.py",
        '"weight_decay": 0.0}',
        '"weight_decay": self.weight_decay}',
        "tests/training/test_optimizer.py::test_all_groups_but_vectors_decay",
    ),
    "a layout found by substring": Mutant(
        ATTENTION + "layout.py",
        "if layout not in LAYOUTS:",
        'if layout not in "bshd sbhd thd":',
        "tests/attention/test_layout.py::test_a_layout_is_compared_by_equality_and_never_by_substring",
    ),
    "keys and values of the ranks gathered on the dim of heads, hidden by a view": Mutant(
        PARALLEL + "context.py",
        "return torch.cat([pieces[chunk] for chunk in range(len(self.owners))], dim=SEQ_DIM)",
        "whole = torch.cat([pieces[i] for i in range(len(self.owners))], dim=min(2, parts[0].ndim - 1)); "
        "return whole.reshape(len(whole), -1, *parts[0].shape[2:])",
        IN_PARTS,
    ),
    "the order of head and tail not undone": Mutant(
        PARALLEL + "context.py",
        "return torch.cat([pieces[chunk] for chunk in range(len(self.owners))], dim=SEQ_DIM)",
        "return torch.cat(parts, dim=SEQ_DIM)",
        IN_PARTS,
    ),
    "the order of head and tail not undone in the backward pass": Mutant(
        PARALLEL + "context.py",
        "return torch.stack([chunks[i] for rank in range(self.n_ranks) for i in self.of_rank(rank)])",
        "return torch.stack(chunks)",
        IN_PARTS,
    ),
    "the mask of another rank's chunks": Mutant(
        PARALLEL + "context.py",
        "        return self.chunks.ranges(self.rank, seq_len)\n",
        "        return self.chunks.ranges(self.chunks.n_ranks - 1 - self.rank, seq_len)\n",
        IN_PARTS,
    ),
    "each rank has two chunks of the head: correct, but unbalanced": Mutant(
        PARALLEL + "context.py", "(*ranks, *reversed(ranks))", "(*ranks, *ranks)", IN_PARTS
    ),
    "keys and values repeated before they are gathered": Mutant(
        PARALLEL + "context.py",
        GATHERED_KEYS,
        GATHERED_KEYS.replace("])", "]).repeat_interleave(q_BsHK.shape[2] // k_BsGK.shape[2], 2)"),
        f"{CONTEXT}::test_the_bytes_sent_grow_with_the_heads_that_the_method_sends_and_no_others[allgather-2]",
    ),
    "gradients of keys summed over ranks twice": Mutant(
        PARALLEL + "context.py",
        SUMMED_KEYS,
        SUMMED_KEYS.replace(", 0, group", ", 0, group) * chunks.n_ranks * (1"),
        IN_PARTS,
    ),
    "gradients of keys not summed over ranks": Mutant(
        PARALLEL + "context.py",
        SUMMED_KEYS,
        "chunks.by_rank(x_BSGK).chunk(chunks.n_ranks)[torch.distributed.get_rank(group)]",
        IN_PARTS,
    ),
    "gradients of shards not summed": Mutant(
        PARALLEL + "fsdp.py",
        "model.set_requires_gradient_sync(last)",
        "model.set_requires_gradient_sync(False)",
        FSDP_2,
    ),
    "gradients of shards summed twice": Mutant(
        PARALLEL + "fsdp.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(0.5)",
        FSDP_2,
    ),
    "gradients of shards averaged over ranks": Mutant(
        PARALLEL + "fsdp.py", "        module.set_gradient_divide_factor(1.0)\n", "", FSDP_2
    ),
    "a shard draws the columns at the start of the whole": Mutant(
        "torchtitan_lite/models/init.py",
        "torch.arange(start // 2, start // 2 + n_pairs,",
        "torch.arange(0, n_pairs,",
        f"{NORMAL}[a stack]",
    ),
    "a shard draws the rows at the start of the whole": Mutant(
        "torchtitan_lite/models/init.py",
        "torch.arange(start, start + n,",
        "torch.arange(0, n,",
        f"{NORMAL}[rows]",
    ),
    "the spread of weights depends on the blocks of this rank, not of the model": Mutant(
        "torchtitan_lite/models/init.py",
        "model.config.rows, model.config.n_layers",
        "model.config.rows, len(model.layers)",
        "tests/models/test_init.py::test_the_depth_is_that_of_the_config_and_not_of_the_blocks_at_hand",
    ),
    "the output projection split by columns, as the others are": Mutant(
        "torchtitan_lite/models/decoder.py",
        '"self_attn.o_proj", shard_dim=1',
        '"self_attn.o_proj", shard_dim=0',
        TP_2,
    ),
    "gradients of norms not summed over tensor parallel": Mutant(
        STEP, "        sum_partial(parameters)\n", "", TP_2
    ),
    "gradients of norms summed twice over tensor parallel": Mutant(
        PARALLEL + "gradients.py",
        "    dist.all_reduce(flat, group=mesh.get_group())\n",
        "    dist.all_reduce(flat, group=mesh.get_group())\n" * 2,
        f"{GRADIENTS}::test_terms_are_summed_in_one_exchange_and_shards_are_left_alone[2]",
    ),
    "the gradient norm of a rank's own shard": Mutant(
        STEP,
        "norm = max(square, 0.0) ** 0.5",
        "norm = squares.item() ** 0.5",
        FSDP_2,
    ),
    "copies of a gradient counted as shards of it": Mutant(
        PARALLEL + "gradients.py",
        " if not gradient.placements[axis].is_replicate()",
        "",
        f"{GRADIENTS}::test_the_ranks_terms_add_up_to_the_norm_of_the_whole_gradient[whole on every rank]",
    ),
    "the count of tokens inflated by context parallel": Mutant(
        STEP, "(self.degrees.context * self.degrees.tensor)", "self.degrees.tensor", CP_2
    ),
    "the count of tokens inflated by tensor parallel": Mutant(
        STEP, "(self.degrees.context * self.degrees.tensor)", "self.degrees.context", TP_2
    ),
    "positions not sharded with the tokens": Mutant(
        PREPARED, ON_DEVICE, ON_DEVICE.replace("positions_BS", "positions_BT[:, : tokens_BS.shape[1]]"), CP_2
    ),
    "labels not sharded with the tokens": Mutant(
        PREPARED, "else own(labels_BS)", "else to_device(labels_BS[:, : tokens_BS.shape[1]], device)", CP_2
    ),
    "rotation at local positions": Mutant(
        PREPARED,
        ON_DEVICE,
        ON_DEVICE.replace("positions_BS", "torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)"),
        CP_2,
    ),
    "a share of the vocabulary off by a row": Mutant(
        PARALLEL + "tensor.py",
        "self.start = mesh.get_local_rank() * n_rows",
        "self.start = mesh.get_local_rank() * (n_rows + 1)",
        LOSS,
    ),
    "the largest logit of a rank's own share": Mutant(
        PARALLEL + "tensor.py",
        "        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)\n",
        "",
        LOSS,
    ),
    "a token of another rank gets the vector of any row": Mutant(
        PARALLEL + "tensor.py",
        " * here_BS[..., None]",
        "",
        f"{TENSOR}::test_an_embedding_by_rows_equals_the_whole_one[2]",
    ),
    "recompute by a function of torch, which torch.compile does not compile": Mutant(
        PARALLEL + "recompute.py",
        "    block.forward = recomputed\n",
        "    import functools\n\n    options |= {'use_reentrant': False, 'preserve_rng_state': False}\n"
        "    block.forward = functools.partial(checkpoint, forward, **options)\n",
        f"{RECOMPUTE}::test_blocks_are_compiled_whole_and_share_a_graph[full]",
    ),
    "attention computed again although it is kept": Mutant(
        PARALLEL + "recompute.py",
        "keep = _qualified(op) in _ATTENTION",
        "keep = False",
        f"{RECOMPUTE}::test_a_block_computes_again_what_its_mode_does_not_keep",
    ),
    "a kept product multiplied again": Mutant(
        PARALLEL + "recompute.py",
        "        if kept.is_recompute:\n",
        "        if False:\n",
        f"{RECOMPUTE}::test_choosing_by_modules_is_choosing_by_operators[sdpa]",
    ),
}

TESTS = sorted({mutant.test for mutant in MUTANTS.values()})
"""The tests that the mutants name."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def test_the_code_that_a_mutant_changes_is_still_there():
    assert [name for name, mutant in MUTANTS.items() if not mutant.is_there] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_fails_on(name, server):
    outcome = server.run([MUTANTS[name].test], MUTANTS[name])
    assert outcome.failed, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({test.partition("::")[0] for test in TESTS}))
def test_no_test_fails_without_a_bug(file, server):
    """A test that fails without a bug shows nothing when it fails with one."""
    outcome = server.run([test for test in TESTS if test.startswith(f"{file}::")])
    assert outcome.status == 0, outcome.output


if __name__ == "__main__":
    with Server() as started:
        for title, mutant in MUTANTS.items():
            done = started.run([mutant.test], mutant)
            verdict = f"caught by {done.failed}" if done.failed else "SURVIVED"
            print(f"{title}\n    {verdict} ({done.cpu_seconds:.1f} s)")
