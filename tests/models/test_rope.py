"""Rotary embedding equals complex rotation; scaled frequencies are those that Llama 3.1 describes."""

import math

import pytest
import torch

from torchtitan_lite.models.rope import RopeScaling, rotate, rotation

HEAD_DIM, THETA = 16, 10_000.0


def complex_rotation(x_BSHK: torch.Tensor, positions_BS: torch.Tensor, theta: float) -> torch.Tensor:
    """The paper's rotation: a complex number of two neighbouring features, times e^(i position frequency)."""
    head_dim = x_BSHK.shape[-1]
    frequency_F = torch.tensor(
        [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64
    )
    angle_BS1F = positions_BS.double()[:, :, None, None] * frequency_F
    z_BSHF = torch.view_as_complex(x_BSHK.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z_BSHF * torch.polar(torch.ones_like(angle_BS1F), angle_BS1F)).flatten(-2)


def described_frequency(frequency: float, scaling: RopeScaling) -> float:
    """Llama 3.1's scaling of one frequency, written from its description in wavelengths."""
    wavelength = 2 * math.pi / frequency
    longest_kept = scaling.original_max_seq_len / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_seq_len / scaling.low_freq_factor
    if wavelength < longest_kept:
        return frequency
    if wavelength > shortest_slowed:
        return frequency / scaling.factor
    turns = scaling.original_max_seq_len / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def test_half_rotation_equals_complex_rotation_of_permuted_pairs():
    torch.manual_seed(0)
    x_BSHK = torch.randn(2, 50, 3, HEAD_DIM)
    positions_BS = torch.stack([torch.arange(50), torch.cat([torch.arange(20), torch.arange(30)])])
    halves = torch.cat([torch.arange(0, HEAD_DIM, 2), torch.arange(1, HEAD_DIM, 2)])
    expected = complex_rotation(x_BSHK, positions_BS, THETA)[..., halves]
    turned = rotate(x_BSHK[..., halves], rotation(positions_BS, HEAD_DIM, THETA, None))
    torch.testing.assert_close(turned.double(), expected, atol=1e-5, rtol=0)


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q_BSHK, k_BSHK = torch.randn(1, 1, 1, HEAD_DIM), torch.randn(1, 1, 1, HEAD_DIM)

    def score(query_position: int, key_position: int) -> float:
        turns = [rotation(torch.tensor([[p]]), HEAD_DIM, THETA, None) for p in (query_position, key_position)]
        return float((rotate(q_BSHK, turns[0]) * rotate(k_BSHK, turns[1])).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(3, 7)) > 1e-2


def test_padding_turns_by_nothing():
    x_BSHK = torch.randn(1, 2, 1, HEAD_DIM)
    assert torch.equal(rotate(x_BSHK, rotation(torch.tensor([[-1, 0]]), HEAD_DIM, THETA, None)), x_BSHK)


def test_neighbours_at_long_context_differ_in_bfloat16_too():
    x_BSHK = torch.randn(1, 1, 1, HEAD_DIM, dtype=torch.bfloat16)
    near, far = (
        rotate(x_BSHK, rotation(torch.tensor([[p]]), HEAD_DIM, THETA, None)) for p in (100_000, 100_001)
    )
    assert near.dtype == torch.bfloat16
    assert (near - far).abs().max() > 0.1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_follows_its_description(factor: float, head_dim: int):
    scaling = RopeScaling(factor=factor)
    frequencies = [500_000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    expected_F = torch.tensor([described_frequency(f, scaling) for f in frequencies], dtype=torch.float64)
    cos_BS1F, sin_BS1F = rotation(torch.tensor([[1]]), head_dim, 500_000.0, scaling)
    torch.testing.assert_close(
        torch.atan2(sin_BS1F, cos_BS1F)[0, 0, 0].double(), expected_F, rtol=1e-5, atol=0
    )
    kinds = torch.tensor(frequencies, dtype=torch.float64) / expected_F
    assert kinds.min() == 1 and kinds.max() == pytest.approx(factor)
    assert ((kinds > 1.01) & (kinds < factor - 0.01)).any(), "no frequency was blended"


def test_a_factor_of_one_scales_nothing():
    positions_BS = torch.arange(100)[None]
    plain = rotation(positions_BS, 64, 500_000.0, None)
    torch.testing.assert_close(rotation(positions_BS, 64, 500_000.0, RopeScaling(factor=1.0)), plain)
