"""The tests notice the bugs that this field has had: each is put back into a copy, and a test must fail.

`python tests/test_mutants.py` applies them all and prints what caught each.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_mutants
import hub_mutants
import pytest
from mutant import Mutant

ROOT = Path(__file__).parents[1]
ATTENTION = "torchtitan_lite/attention/"
ORACLE = "tests/attention/test_oracle.py"
MEMORY = "tests/attention/test_memory.py"
PARALLEL = "torchtitan_lite/parallel/"
TRAINER = "torchtitan_lite/training/trainer.py"
CONTEXT, TENSOR, GRADIENTS, RECOMPUTE = (
    f"tests/parallel/test_{name}.py" for name in ("context", "tensor", "gradients", "recompute")
)
GRID = "tests/parallel/test_grid.py::test_n_ranks_train_as_one_does"
FSDP_2, CP_2, TP_2 = (
    f"{GRID}[float64-{cell}]"
    for cell in ("weights kept until the backward", "sliding window, sdpa", "no loss parallel, tied")
)

PORTABLE_VARLEN = "            return attend(q_BQHK, k_BSGK, v_BSGK, mask.tiles, scale)\n"
HEADS_FIRST = "(x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))"
REPEATED = HEADS_FIRST.replace(" for", ".repeat_interleave(q_BSHK.shape[2] // x.shape[2], 1) for")
SUMMED_KEYS = '_reduce_scatter(both_C2BcGK, "sum", 0, ctx.group)'
FIRST = "batch.{}[:, : tokens_BS.shape[1]]"
CALL_OF_MODEL = "return self.model(tokens_BS, positions_BS, mask, labels_BS)"
MUTANTS = {
    **checkpoint_mutants.MUTANTS,
    **hub_mutants.MUTANTS,
    "varlen: an extra transpose of the loop's output, hidden by a view": Mutant(
        ATTENTION + "varlen.py",
        PORTABLE_VARLEN,
        PORTABLE_VARLEN.replace("scale)", "scale).transpose(2, 3).reshape(q_BQHK.shape)"),
        ORACLE,
    ),
    "varlen: an extra transpose of the kernel's output, hidden by a view": Mutant(
        ATTENTION + "varlen.py",
        "return out_THK.unflatten(0, q_BQHK.shape[:2])",
        "return out_THK.transpose(1, 2).reshape(q_BQHK.shape)",
        ORACLE,
    ),
    "varlen: the scale does not reach the kernel": Mutant(
        ATTENTION + "varlen.py",
        "(q, k, v, run, scale, window)",
        "(q, k, v, run, q.shape[-1] ** -0.5, window)",
        ORACLE,
    ),
    "varlen: the window does not reach the kernel": Mutant(
        ATTENTION + "varlen.py", "(q, k, v, run, scale, window)", "(q, k, v, run, scale, None)", ORACLE
    ),
    "all backends: the scale that is given is dropped": Mutant(
        ATTENTION + "mask.py", "** -0.5 if scale is None else scale", "** -0.5", ORACLE
    ),
    "sdpa: the scale does not reach the kernel": Mutant(
        ATTENTION + "sdpa.py", "is_causal=True, scale=scale,", "is_causal=True,", ORACLE
    ),
    "flex: the scale does not reach the kernel": Mutant(
        ATTENTION + "flex.py", "            scale=scale,\n", "", ORACLE
    ),
    "causality of short queries aligned at the top left": Mutant(
        ATTENTION + "tiles.py",
        "    diagonal = k1 - (q1 - q0)\n",
        "    diagonal, k1 = k0, k0 + (q1 - q0)\n",
        ORACLE,
    ),
    "keys sliced by the queries' length": Mutant(
        ATTENTION + "mask.py",
        "q1 - first + offset, start, q1]",
        "q1 - first + offset, q0, q1]",
        ORACLE,
    ),
    "documents leak, in the segments": Mutant(
        ATTENTION + "mask.py",
        "q1 - first + offset, start, q1]",
        "q1 - first + offset, start * 0, q1]",
        ORACLE,
    ),
    "documents leak, in the intervals": Mutant(
        ATTENTION + "mask.py", "first_BS = index_S - positions_BS", "first_BS = positions_BS * 0", ORACLE
    ),
    "a window one token too long, in the tiles": Mutant(
        ATTENTION + "tiles.py", "behind - self.window + 1)", "behind - self.window)", ORACLE
    ),
    "a window one token too long, in the intervals": Mutant(
        ATTENTION + "mask.py", "index_S - (sliding_window - 1)", "index_S - sliding_window", ORACLE
    ),
    "tiles of the same queries overwrite each other": Mutant(
        ATTENTION + "tile_kernels.py", "if not call.fresh_queries:", "if False:", ORACLE
    ),
    "gradients of shared keys overwrite each other": Mutant(
        ATTENTION + "tile_kernels.py", "            if first:\n", "            if True:\n", ORACLE
    ),
    "block size of flex dropped on the way to the mask": Mutant(
        ATTENTION + "flex.py",
        "queries, sliding_window, self.blocks\n",
        "queries, sliding_window, (128, 128)\n",
        "tests/attention/test_capabilities.py",
    ),
    "keys and values repeated to all heads": Mutant(ATTENTION + "sdpa.py", HEADS_FIRST, REPEATED, MEMORY),
    "a copy into another layout before the kernel": Mutant(
        ATTENTION + "sdpa.py",
        HEADS_FIRST,
        HEADS_FIRST.replace(" for", ".contiguous() for"),
        MEMORY,
    ),
    "keys and values repeated before they reach the backend": Mutant(
        "torchtitan_lite/models/decoder.py",
        "out_BSHK = self.inner(q_BSHK, k_BSGK, v_BSGK, mask)",
        "n = q_BSHK.shape[2] // k_BSGK.shape[2]; out_BSHK = self.inner(q_BSHK, "
        "k_BSGK.repeat_interleave(n, 2), v_BSGK.repeat_interleave(n, 2), mask)",
        "tests/models/test_decoder.py",
    ),
    "an extra transpose of the attention's output in the decoder, hidden by a view": Mutant(
        "torchtitan_lite/models/decoder.py",
        "self.wo(out_BSHK.flatten(2))",
        "self.wo(out_BSHK.transpose(2, 3).flatten(2))",
        "tests/models/test_decoder.py",
    ),
    "a label across the end of a document": Mutant(
        "torchtitan_lite/data/batch.py",
        "        labels[breaks - 1] = IGNORE\n",
        "",
        "tests/data/test_batch.py",
    ),
    "each micro-batch divided by its own count of tokens": Mutant(
        "torchtitan_lite/training/trainer.py",
        "(loss_sum / n_valid).backward()",
        "(loss_sum / (batch.labels_BS != IGNORE).sum() / len(micro)).backward()",
        "tests/training/test_trainer.py",
    ),
    "the weights change before a number is known to be finite": Mutant(
        "torchtitan_lite/training/trainer.py",
        "        check_finite(step=self.step + 1,",
        "        self.optimizer.step(); check_finite(step=self.step + 1,",
        "tests/training/test_trainer.py",
    ),
    "norms decay like matrices": Mutant(
        "torchtitan_lite/training/optimizer.py", "ndim >= 2", "ndim >= 1", "tests/training/test_optimizer.py"
    ),
    "a layout found by substring": Mutant(
        ATTENTION + "layout.py",
        "if layout not in LAYOUTS:",
        'if layout not in "bshd sbhd thd":',
        "tests/attention/test_layout.py",
    ),
    "keys and values of the ranks gathered on the dim of heads, hidden by a view": Mutant(
        PARALLEL + "context.py",
        "return torch.cat([piece for piece in pieces if piece is not None], dim=SEQ_DIM)",
        "whole = torch.cat([piece for piece in pieces if piece is not None], dim=min(2, parts[0].ndim - 1)); "
        "return whole.reshape(len(whole), -1, *parts[0].shape[2:])",
        CONTEXT,
    ),
    "the order of head and tail not undone": Mutant(
        PARALLEL + "context.py",
        "return torch.cat([piece for piece in pieces if piece is not None], dim=SEQ_DIM)",
        "return torch.cat(parts, dim=SEQ_DIM)",
        CONTEXT,
    ),
    "the order of head and tail not undone in the backward pass": Mutant(
        PARALLEL + "context.py",
        "return torch.stack([chunks[i] for rank in range(self.n_ranks) for i in self.chunks_of(rank)])",
        "return torch.stack(chunks)",
        CONTEXT,
    ),
    "the mask of another rank's chunks": Mutant(
        PARALLEL + "context.py",
        "        return self.split.ranges(self.rank, seq_len)\n",
        "        return self.split.ranges(self.split.n_ranks - 1 - self.rank, seq_len)\n",
        CONTEXT,
    ),
    "two heads and no tail: right, but unbalanced": Mutant(
        PARALLEL + "context.py", "(*ranks, *reversed(ranks))", "(*ranks, *ranks)", CONTEXT
    ),
    "keys and values repeated before they are gathered": Mutant(
        PARALLEL + "context.py",
        "        k_BSGK, v_BSGK = _Gather.apply(k_BsGK, v_BsGK, self.split, self.group)\n",
        "        n = q_BsHK.shape[2] // k_BsGK.shape[2]\n"
        "        repeated = (x.repeat_interleave(n, 2) for x in (k_BsGK, v_BsGK))\n"
        "        k_BSGK, v_BSGK = _Gather.apply(*repeated, self.split, self.group)\n",
        CONTEXT,
    ),
    "gradients of keys summed over ranks twice": Mutant(
        PARALLEL + "context.py",
        SUMMED_KEYS,
        SUMMED_KEYS.replace("both_C2BcGK", 'collectives.all_reduce(both_C2BcGK, "sum", ctx.group)'),
        CONTEXT,
    ),
    "gradients of keys not summed over ranks": Mutant(
        PARALLEL + "context.py",
        SUMMED_KEYS,
        "both_C2BcGK.chunk(ctx.split.n_ranks)[dist.get_rank(ctx.group)]",
        CONTEXT,
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
        PARALLEL + "fsdp.py", "            module.set_gradient_divide_factor(1.0)\n", "", FSDP_2
    ),
    "gradients of norms not summed over tensor parallel": Mutant(
        TRAINER, "        sum_partial(parameters)\n", "", TP_2
    ),
    "gradients of norms summed twice over tensor parallel": Mutant(
        PARALLEL + "gradients.py",
        "    dist.all_reduce(flat, group=mesh.get_group())\n",
        "    dist.all_reduce(flat, group=mesh.get_group())\n" * 2,
        GRADIENTS,
    ),
    "the gradient norm of a rank's own shard": Mutant(
        TRAINER,
        "norm = squares.sqrt()",
        "norm = squared_norm(parameters, self.world.size).to(loss).sqrt()",
        FSDP_2,
    ),
    "copies of a gradient counted as shards of it": Mutant(
        PARALLEL + "gradients.py",
        " if not gradient.placements[axis].is_replicate()",
        "",
        GRADIENTS,
    ),
    "the count of tokens inflated by context parallel": Mutant(
        TRAINER, "(self.degrees.context * self.degrees.tensor)", "self.degrees.tensor", CP_2
    ),
    "the count of tokens inflated by tensor parallel": Mutant(
        TRAINER, "(self.degrees.context * self.degrees.tensor)", "self.degrees.context", TP_2
    ),
    "positions not sharded with the tokens": Mutant(
        TRAINER, CALL_OF_MODEL, CALL_OF_MODEL.replace("positions_BS", FIRST.format("positions_BS")), CP_2
    ),
    "labels not sharded with the tokens": Mutant(
        TRAINER, CALL_OF_MODEL, CALL_OF_MODEL.replace("labels_BS", FIRST.format("labels_BS")), CP_2
    ),
    "rotation at local positions": Mutant(
        TRAINER,
        CALL_OF_MODEL,
        CALL_OF_MODEL.replace("positions_BS", "torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)"),
        CP_2,
    ),
    "a share of the vocabulary off by a row": Mutant(
        PARALLEL + "tensor.py",
        "self.start = mesh.get_local_rank() * n_rows",
        "self.start = mesh.get_local_rank() * (n_rows + 1)",
        TENSOR,
    ),
    "the largest logit of a rank's own share": Mutant(
        PARALLEL + "tensor.py",
        "        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)\n",
        "",
        TENSOR,
    ),
    "any row's vector for a token of another rank": Mutant(
        PARALLEL + "tensor.py", " * here_BS[..., None]", "", TENSOR
    ),
    "recompute by a function of torch, which torch.compile passes over": Mutant(
        PARALLEL + "recompute.py",
        "    block.forward = recomputed\n",
        "    import functools\n\n    block.forward = functools.partial(checkpoint, forward, **options)\n",
        RECOMPUTE,
    ),
    "attention computed again although it is kept": Mutant(
        PARALLEL + "recompute.py",
        "keep = _qualified(op) in _ATTENTION",
        "keep = False",
        RECOMPUTE,
    ),
}


def survivors(mutant: Mutant, folder: Path) -> tuple[int, str]:
    """pytest's exit status on a copy of the repository with the bug, and the first test that failed."""
    for name in ("torchtitan_lite", "tests", "docs", "configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file} has {source.count(mutant.old)} times: {mutant.old}"
    path.write_text(source.replace(mutant.old, mutant.new))
    tests, _, expression = mutant.tests.partition(" -k ")
    chosen = [tests, "-k", expression] if expression else [tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    failed = re.search(r"^FAILED (\S+::\w+)", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-2000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_the_code_that_a_mutant_changes_is_still_there(name):
    assert (ROOT / MUTANTS[name].file).read_text().count(MUTANTS[name].old) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_fails_on(name, tmp_path):
    status, failed = survivors(MUTANTS[name], tmp_path)
    assert status == 1, failed  # 1: tests were run, and some failed
    assert "::" in failed


if __name__ == "__main__":
    import tempfile

    for title, mutant in MUTANTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            code, caught = survivors(mutant, Path(temporary))
        print(f"{'caught' if code == 1 else 'SURVIVED'}: {title}\n    {caught}")
