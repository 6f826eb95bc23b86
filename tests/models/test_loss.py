"""The chunked loss equals the plain loss, and never holds all logits."""

from functools import partial

import pytest
import torch
from loss_kernel_cases import Loss, assert_equal_to, check_exactness, inputs, results
from operators import Memory

from torchtitan_lite.models import loss as loss_module
from torchtitan_lite.models.loss import IGNORE, chunk_rows, linear_cross_entropy, reference_cross_entropy


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch) -> None:
    """Split even the few logits of these tests into several chunks."""
    monkeypatch.setattr(loss_module, "_LITTLE_BYTES", 0)


assert_equal_to_reference = partial(assert_equal_to, reference_cross_entropy)


@pytest.mark.parametrize("n_rows", [2, 16, 30, 326])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_reference(dtype: torch.dtype, tolerance: float, n_rows: int):
    x, weight, labels = inputs(n_rows, vocab=97, dim=24, dtype=dtype, weight_dtype=dtype)
    assert n_rows < 100 or n_rows % chunk_rows(n_rows, 97, x) != 0, "the last chunk was meant to be smaller"
    assert_equal_to_reference(tolerance, x, weight, labels)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_hidden_states_give_gradients_in_the_dtype_of_the_weight(weight_dtype: torch.dtype):
    # More than two tiles of the vocabulary, the last one smaller.
    x, weight, labels = inputs(326, vocab=20_000, dim=16, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    assert_equal_to_reference(1e-2, x, weight, labels)


@pytest.mark.parametrize(("n_rows", "vocab"), [(512, 300), (256, 65_536)], ids=["32 chunks", "8 tiles"])
def test_bfloat16_gradients_are_as_exact_as_those_of_one_product(n_rows: int, vocab: int):
    # This would fail if sums over chunks (dweight) or tiles (dx) were in bfloat16.
    check_exactness(n_rows, vocab, "cpu")


def test_gradients_pass_gradcheck_also_where_only_one_is_needed():
    x, weight, labels = inputs(40, vocab=11, dim=8, dtype=torch.float64, weight_dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels)[0], (x, weight))
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, weight.detach(), labels)[0], (x,))
    assert torch.autograd.gradcheck(lambda w: linear_cross_entropy(x.detach(), w, labels)[0], (weight,))


def test_a_chunk_without_labels_adds_nothing():
    x, weight, labels = inputs(128, vocab=50, dim=8, dtype=torch.float64, weight_dtype=torch.float64)
    labels.flatten()[:48] = IGNORE
    assert chunk_rows(128, 50, x) <= 24, "a whole chunk was meant to be ignored"
    assert_equal_to_reference(1e-12, x, weight, labels)


def test_without_any_label_loss_and_gradients_are_zero():
    x, weight, labels = inputs(40, vocab=50, dim=8, dtype=torch.float32, weight_dtype=torch.float32)
    value, count, dx, dweight = results(linear_cross_entropy, x, weight, torch.full_like(labels, IGNORE))
    assert value == 0 and count == 0
    assert not dx.any() and not dweight.any()


def test_large_logits_neither_overflow_nor_lose_the_loss():
    x = torch.tensor([[[200.0, 0.0]]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    assert linear_cross_entropy(x, weight, torch.tensor([[1]]))[0].item() == 200.0
    assert linear_cross_entropy(x, weight, torch.tensor([[0]]))[0].item() == 0.0


def test_a_label_outside_the_vocabulary_is_an_error():
    x, weight, labels = inputs(4, vocab=11, dim=8, dtype=torch.float32, weight_dtype=torch.float32)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(x, weight, torch.full_like(labels, 11))


def test_a_second_backward_pass_is_right_or_refused():
    x, weight, labels = inputs(40, vocab=11, dim=8, dtype=torch.float64, weight_dtype=torch.float64)
    value, _ = linear_cross_entropy(x, weight, labels)
    once = torch.autograd.grad(value, weight, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * value, weight)[0]
    torch.testing.assert_close(thrice, 3 * once)
    with pytest.raises(RuntimeError, match="retain_graph"):
        value.backward()


def test_without_gradients_the_value_is_the_same():
    x, weight, labels = inputs(326, vocab=97, dim=24, dtype=torch.float32, weight_dtype=torch.float32)
    value, count = linear_cross_entropy(x, weight, labels)
    with torch.no_grad():
        quiet_value, quiet_count = linear_cross_entropy(x, weight, labels)
    assert quiet_value.grad_fn is None
    assert torch.equal(quiet_value, value.detach()) and torch.equal(quiet_count, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_little_memory_have_more_rows_and_give_the_same(monkeypatch, dtype: torch.dtype):
    x, weight, labels = inputs(326, vocab=1000, dim=24, dtype=dtype, weight_dtype=torch.float32)
    chunked = results(linear_cross_entropy, x, weight, labels)
    monkeypatch.setattr(loss_module, "_LITTLE_BYTES", 200 * 1000 * 4)
    with Memory() as memory:
        found = results(linear_cross_entropy, x, weight, labels)
    assert memory.largest == 200 * 1000 * 4
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, chunked, rtol=tolerance, atol=tolerance / 10)


def test_chunks_are_a_sixteenth_of_the_logits_within_bounds():
    wide, narrow = torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.bfloat16)
    assert [chunk_rows(n, VOCAB, wide) for n in (10, 100, 512, 8192, 100_000)] == [10, 16, 32, 512, 2048]
    assert [chunk_rows(n, VOCAB, narrow) for n in (100, 1024, 8192, 100_000)] == [16, 32, 256, 2048]
    assert chunk_rows(5000, VOCAB, wide.to("meta")) == 2048, "other devices have one size of chunk"


VOCAB, ROWS = 49_152, 512


def peak_bytes(loss: Loss, dtype: torch.dtype) -> int:
    """Bytes held by forward and backward beyond the inputs and their two gradients."""
    x, weight, labels = inputs(ROWS, VOCAB, dim=4, dtype=dtype, weight_dtype=torch.float32)
    with Memory() as memory:
        value, _ = loss(x, weight, labels)
        value.backward()
    assert x.grad is not None and weight.grad is not None
    return memory.peak - x.grad.nbytes - weight.grad.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_takes_a_small_part_of_the_memory_of_its_logits(dtype: torch.dtype):
    all_logits = ROWS * VOCAB * dtype.itemsize
    assert peak_bytes(linear_cross_entropy, dtype) < all_logits / 12
    assert peak_bytes(reference_cross_entropy, dtype) > all_logits


def test_evaluation_holds_one_chunk_and_no_gradient():
    x, weight, labels = inputs(ROWS, VOCAB, dim=4, dtype=torch.float32, weight_dtype=torch.float32)
    with Memory() as memory, torch.no_grad():
        linear_cross_entropy(x, weight, labels)
    chunk = chunk_rows(ROWS, VOCAB, x) * VOCAB * 4
    assert chunk <= memory.peak < 1.05 * chunk
    assert memory.largest == chunk


def test_the_gradient_of_the_weight_is_made_once_and_never_copied():
    x, weight, labels = inputs(ROWS, 20_000, dim=64, dtype=torch.float32, weight_dtype=torch.float32)
    with Memory() as memory:
        linear_cross_entropy(x, weight, labels)[0].backward()
    assert weight.grad is not None
    made = weight.grad.nbytes + chunk_rows(ROWS, 20_000, x) * 20_000 * 4
    assert memory.peak < made + weight.grad.nbytes / 2
