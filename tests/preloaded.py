"""Imports every module that is slow to import, and runs once, so that forked processes start fast."""

import contextlib
import gc
import os

# torch 2.11 looks for a GPU when it imports its benchmarker. After that no fork could use a GPU.
os.environ["TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER"] = "0"

from programs import RankOfTorchrun, exit_functions_noted

with exit_functions_noted():
    import parallel_cases
    import ranks
    import torch
    import torch._dynamo.backends.debugging
    import torch._functorch.aot_autograd
    import torch._inductor.compile_fx
    import torch.distributed.fsdp
    import torch.distributed.run
    import torch.distributed.tensor.parallel
    import torch.utils.tensorboard
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from torchtitan_lite import cli, run_folder, train
    from torchtitan_lite.inference import commands
    from torchtitan_lite.training import record, trainer

IMPORTED = (parallel_cases, ranks, cli, run_folder, commands, record, trainer)


def popen(
    handler: subprocess_handler.SubprocessHandler, args: tuple[str, ...], env: dict[str, str]
) -> RankOfTorchrun:
    """Start a rank of torchrun as a fork."""
    out, err = handler._stdout, handler._stderr
    return RankOfTorchrun(args, env=env, stdout=out, stderr=err, text=True, start_new_session=True)


subprocess_handler.SubprocessHandler._popen = popen  # pyright: ignore[reportAttributeAccessIssue]
torch.set_num_threads(1)
with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
    train.main(["--dry-run", "--job.device", "cpu"])  # after a look for a GPU, no fork could use one
# Otherwise the garbage collection of a fork would write to, and so copy, every page of today's objects.
gc.collect()
gc.freeze()
