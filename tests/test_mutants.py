"""The tests notice the bugs that this field has had: each is put back into a copy, and a test must fail.

`python tests/test_mutants.py` applies them all and prints what caught each.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ATTENTION = "torchtitan_lite/attention/"
ORACLE = "tests/attention/test_oracle.py"
MEMORY = "tests/attention/test_memory.py"


class Mutant(NamedTuple):
    """A bug: in `file`, `old` becomes `new`; one of `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str


PORTABLE_VARLEN = "            return attend(q_BQHK, k_BSGK, v_BSGK, mask.tiles, scale)\n"
HEADS_FIRST = "(x.transpose(1, 2) for x in (q_BQHK, k_BSGK, v_BSGK))"
REPEATED = HEADS_FIRST.replace(" for", ".repeat_interleave(q_BQHK.shape[2] // x.shape[2], 1) for")
MUTANTS = {
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
}


def survivors(mutant: Mutant, folder: Path) -> tuple[int, str]:
    """pytest's exit status on a copy of the repository with the bug, and the first test that failed."""
    for name in ("torchtitan_lite", "tests", "docs", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file} has {source.count(mutant.old)} times: {mutant.old}"
    path.write_text(source.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.tests]
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
