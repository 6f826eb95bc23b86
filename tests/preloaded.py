"""Imports all that is slow to import and uses it once, so that forked processes need not."""

import contextlib
import gc
import os

# torch 2.11 looks for a GPU when it imports its benchmarker, after which no fork could use one.
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
    """How a torchrun starts a rank here."""
    out, err = handler._stdout, handler._stderr
    return RankOfTorchrun(args, env=env, stdout=out, stderr=err, text=True, start_new_session=True)


subprocess_handler.SubprocessHandler._popen = popen  # pyright: ignore[reportAttributeAccessIssue]
torch.set_num_threads(1)
with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
    train.main(["--dry-run", "--job.device", "cpu"])  # to ask for a GPU would keep it from all forks
# A fork that looks for garbage would otherwise write to, and so copy, every page of what is there now.
gc.collect()
gc.freeze()
