"""Copies to a GPU."""

import torch

from torchtitan_lite.attention.transfer import to_device


def test_a_copy_to_a_gpu_is_made_from_pinned_memory_and_not_waited_for(monkeypatch):
    x, pinned, calls = torch.ones(3), torch.zeros(3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append(self) or pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: (self, args, kwargs))
    assert to_device(x, "cuda") == (pinned, (torch.device("cuda"),), {"non_blocking": True})
    assert calls == [x]


def test_what_stays_on_the_cpu_is_neither_pinned_nor_copied():
    x = torch.ones(3)
    assert to_device(x, "cpu") is x
