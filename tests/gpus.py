"""Decides which tests may see a GPU."""

import os
import re

_ASKED_FOR = re.compile(r"(?<!\bnot )\bgpu\b")
_MAY_CHOOSE_OTHERS = re.compile(r"\bor\b|\bnot *\(")


def are_hidden(mark_expression: str) -> bool:
    """True unless pytest's -m chooses tests marked gpu, and no others."""
    return not _ASKED_FOR.search(mark_expression) or bool(_MAY_CHOOSE_OTHERS.search(mark_expression))


def hide() -> None:
    """Hide all GPUs from this process and its children.

    The results of CPU tests must not depend on a GPU: two ranks may find only one GPU, or a kernel may need
    a package. Call this before torch looks for a GPU.
    """
    # Not an empty variable: some programs that tests start drop empty ones.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # torch then counts GPUs without starting the driver. Once the driver has started, no fork can use a GPU.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
