"""The states of a process's generators of random numbers, as JSON."""

import base64
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's own generators, of this rank's GPU too if it uses one."""
    version, words, spare = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(words), spare],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def check_random_state(state: Any) -> None:
    """Raise ValueError unless `state` is one that `set_random_state` can set; no generator is touched."""
    try:
        _set(state, random.Random(), np.random.RandomState(), torch.Generator())
        if state["cuda"] is not None and _tensor(state["cuda"]).numel() and torch.cuda.is_available():
            torch.Generator("cuda").set_state(_tensor(state["cuda"]))
    except Exception as error:
        raise ValueError("its generators' states are none") from error


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    _set(state, random, np.random, torch.default_generator)
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _set(state: dict[str, Any], python: Any, numpy: Any, torch_: torch.Generator) -> None:
    version, words, spare = state["python"]
    kind, keys, place, *rest = state["numpy"]
    # These two the generators take as they come: the first one fails with them later, the other reads there.
    if not (spare is None or isinstance(spare, float)) or place not in range(len(keys) + 1):
        raise ValueError
    python.setstate((version, tuple(words), spare))
    numpy.set_state((kind, np.array(keys, dtype=np.uint32), place, *rest))
    torch_.set_state(_tensor(state["torch"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
