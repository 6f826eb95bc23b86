"""Which tests may see a GPU."""

import os
import re

_ASKED_FOR = re.compile(r"(?<!\bnot )\bgpu\b")


def are_hidden(mark_expression: str) -> bool:
    """Whether tests that are chosen by this (pytest's -m) see no GPU: unless they are chosen for one."""
    return not _ASKED_FOR.search(mark_expression)


def hide() -> None:
    """Let this process and those that it starts see no GPU.

    A machine with one must not change what the tests of CPU runs find: two ranks with one GPU, say, or a
    package that only a GPU needs. Must run before torch looks for a GPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        "-1"  # an empty variable would not reach all programs that tests start
    )
    # torch then reads that variable, and need not start the driver, which no process could do after a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
