"""The decoder equals an independent one, and no token sees a token that is hidden from it."""

import inspect
from collections.abc import Sequence

import pytest
import torch
from operators import Operators
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.models import decoder as decoder_module
from torchtitan_lite.models.decoder import Decoder, DecoderConfig
from torchtitan_lite.models.loss import IGNORE, reference_cross_entropy
from torchtitan_lite.models.registry import families, resolve

BACKENDS = [Sdpa(), Flex(), Varlen(kernel="documents")]
SMALL = {
    "n_layers": 2,
    "dim": 48,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 80,
    "vocab_size": 131,
}


def small(family: str = "qwen3", attention=None, **overrides) -> DecoderConfig:
    return resolve(family, "debugmodel", attention, {**SMALL, **overrides})


def packed(*lengths: int) -> Tensor:
    """The positions of one row of documents of these lengths, [1, S]."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


def tokens(positions_BS: Tensor, seed: int = 0) -> Tensor:
    return torch.randint(131, positions_BS.shape, generator=torch.Generator().manual_seed(seed))


def mask_of(config: DecoderConfig, positions_BS: Tensor) -> object:
    return config.attention.mask(positions_BS, sliding_window=config.sliding_window)


def loss_of(
    model: Decoder, tokens_BS: Tensor, positions_BS: Tensor, labels_BS: Tensor
) -> tuple[Tensor, Tensor]:
    loss = model(tokens_BS, positions_BS, mask_of(model.config, positions_BS), labels_BS)
    assert isinstance(loss, tuple)
    return loss


def influence(model: Decoder, positions_BS: Tensor, at: int) -> Tensor:
    """For each embedding, the norm of the gradient of the loss of token `at` in row 0, [B, S]."""
    embedded: list[Tensor] = []

    def record(module: nn.Module, args: object, out: Tensor) -> None:
        embedded.append(out)

    hook = model.embedding.register_forward_hook(record)
    labels_BS = torch.full_like(positions_BS, IGNORE)
    labels_BS[0, at] = 7
    loss, _ = loss_of(model, tokens(positions_BS), positions_BS, labels_BS)
    hook.remove()
    return torch.autograd.grad(loss, embedded[0])[0].norm(dim=-1)


def reference_decoder(model: Decoder, tokens_BS: Tensor, positions_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """The same architecture, written from the papers in float64, with repeated heads and an explicit mask."""
    config, weights = model.config, {name: p.double() for name, p in model.named_parameters()}
    n_rows, seq_len = tokens_BS.shape

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    def heads(x: Tensor, name: str) -> Tensor:
        split = (x @ weights[f"{name}.weight"].T).view(n_rows, seq_len, -1, config.head_dim).transpose(1, 2)
        return split.repeat_interleave(config.n_heads // split.shape[1], dim=1)

    frequency = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    )
    frequency = config.rope_scaling.apply(frequency) if config.rope_scaling else frequency
    turn = torch.polar(torch.ones(()).double(), positions_BS[:, None, :, None].double() * frequency)

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : config.head_dim // 2], x[..., config.head_dim // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    index = torch.arange(seq_len)
    document = (positions_BS == 0).cumsum(1)
    sees = (index[:, None] >= index) & (document[:, :, None] == document[:, None, :])
    if config.sliding_window:
        sees &= index[:, None] - index < config.sliding_window
    x = weights["embedding.weight"][tokens_BS]
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        y = norm(x, f"{block}.attention_norm.weight")
        q, k, v = (heads(y, f"{block}.attention.{name}") for name in ("wq", "wk", "wv"))
        if config.qk_norm:
            q, k = norm(q, f"{block}.attention.q_norm.weight"), norm(k, f"{block}.attention.k_norm.weight")
        scores = turned(q) @ turned(k).transpose(2, 3) / config.head_dim**0.5
        out = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1) @ v
        x = x + out.transpose(1, 2).flatten(2) @ weights[f"{block}.attention.wo.weight"].T
        y = norm(x, f"{block}.ffn_norm.weight")
        gate, up = (y @ weights[f"{block}.ffn.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{block}.ffn.w2.weight"].T
    head = weights.get("head.weight", weights["embedding.weight"])
    return reference_cross_entropy(norm(x, "norm.weight"), head, labels_BS)[0]


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("window", [None, 5])
def test_loss_and_gradients_equal_those_of_an_independent_decoder(family: str, attention, window: int | None):
    model = (
        small(family, attention, sliding_window=window).build()
        if window
        else small(family, attention).build()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape) if "norm" in name else 5)
    positions_BS = torch.cat([packed(11, 1, 12), packed(24)])
    tokens_BS, labels_BS = tokens(positions_BS), tokens(positions_BS, seed=1)
    labels_BS[positions_BS == 4] = IGNORE
    parameters = list(model.parameters())
    loss, count = loss_of(model, tokens_BS, positions_BS, labels_BS)
    expected = reference_decoder(model, tokens_BS, positions_BS, labels_BS)
    assert loss.dtype == torch.float32 and count.item() == (labels_BS != IGNORE).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
def test_no_token_is_predicted_from_later_ones(attention):
    model = small(attention=attention).build()
    for at in (0, 9, 19):
        felt_S = influence(model, packed(20), at)[0]
        assert (felt_S[: at + 1] > 0).all()
        assert (felt_S[at + 1 :] == 0).all()


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
def test_no_token_is_predicted_from_other_documents_or_rows(attention):
    model = small(attention=attention).build()
    felt_BS = influence(model, packed(7, 1, 12).repeat(2, 1), at=14)
    assert felt_BS[0].nonzero().flatten().tolist() == list(range(8, 15))
    assert not felt_BS[1].any()


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
def test_a_sliding_window_of_one_layer_reaches_its_tokens_and_no_further(attention):
    model = small(attention=attention, sliding_window=4, n_layers=1).build()
    assert influence(model, packed(20), at=12)[0].nonzero().flatten().tolist() == [9, 10, 11, 12]
    model = small(attention=attention, sliding_window=4, n_layers=2).build()
    assert influence(model, packed(20), at=12)[0].nonzero().flatten().tolist() == list(range(6, 13))


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
def test_packed_documents_give_the_loss_and_gradients_of_separate_ones(attention):
    model = small(attention=attention).build()
    lengths = (9, 1, 14)
    tokens_BS, labels_BS = tokens(packed(*lengths)), tokens(packed(*lengths), seed=1)
    together, n_together = loss_of(model, tokens_BS, packed(*lengths), labels_BS)
    together.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    apart, n_apart = 0.0, 0
    for document, labels in zip(tokens_BS.split(lengths, 1), labels_BS.split(lengths, 1), strict=True):
        loss, count = loss_of(model, document, packed(document.shape[1]), labels)
        loss.backward()
        apart, n_apart = apart + loss.item(), n_apart + count.item()
    assert n_together == n_apart
    assert together.item() == pytest.approx(apart, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
def test_padding_changes_nothing(attention):
    model = small(attention=attention).build()
    tokens_BS, labels_BS = tokens(packed(10)), tokens(packed(10), seed=1)
    plain, _ = loss_of(model, tokens_BS, packed(10), labels_BS)
    pads = {"value": 0, "pad": (3, 2)}
    padded, count = loss_of(
        model,
        F.pad(tokens_BS, **pads),
        F.pad(packed(10), (3, 2), value=-1),
        F.pad(labels_BS, (3, 2), value=IGNORE),
    )
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=0)
    assert count.item() == 10


def test_without_labels_the_logits_are_those_after_the_last_token_of_each_row():
    model = small("llama3").build()
    positions_BS = torch.stack([torch.arange(12), torch.cat([torch.arange(9), torch.full((3,), -1)])])
    tokens_BS = tokens(positions_BS)
    logits_BV = model(tokens_BS, positions_BS, mask_of(model.config, positions_BS))
    assert logits_BV.shape == (2, 131) and logits_BV.dtype == torch.float32
    for row, length in enumerate((12, 9)):
        alone_1S, positions_1S = tokens_BS[row : row + 1, :length], packed(length)
        labels = [torch.full_like(alone_1S, IGNORE) for _ in range(131)]
        for label, labels_1S in enumerate(labels):
            labels_1S[0, -1] = label
        losses = [loss_of(model, alone_1S, positions_1S, each)[0] for each in labels[:5]]
        expected = -logits_BV[row].log_softmax(-1)[:5]
        torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_one_parameter_that_gets_both_gradients():
    tied, untied = (small(tie_embeddings=tie).build() for tie in (True, False))
    assert tied.head_weight_VD is tied.embedding.weight
    assert untied.head_weight_VD is not untied.embedding.weight
    names = [dict(model.named_parameters()).keys() for model in (tied, untied)]
    assert names[1] - names[0] == {"head.weight"}
    assert "head.weight" not in tied.state_dict()
    with torch.no_grad():
        untied.head_weight_VD.copy_(tied.embedding.weight)
    positions_BS = packed(20)
    for model in (tied, untied):
        loss_of(model, tokens(positions_BS), positions_BS, tokens(positions_BS, seed=1))[0].backward()
    assert untied.embedding.weight.grad is not None and untied.head_weight_VD.grad is not None
    both = untied.embedding.weight.grad + untied.head_weight_VD.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)


@pytest.mark.parametrize("family", families)
def test_bfloat16_compute_keeps_parameters_gradients_and_loss_in_float32(family: str):
    config = small(family)
    positions_BS = packed(13, 11)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = config.build(dtype)
        seen: set[torch.dtype] = set()

        def record(module: nn.Module, args: object, out: Tensor, seen: set = seen) -> None:
            seen.add(out.dtype)

        for module in model.blocks.modules():
            module.register_forward_hook(record)
        loss, count = loss_of(model, tokens(positions_BS), positions_BS, tokens(positions_BS, seed=1))
        (loss / count).backward()
        assert seen == {dtype}, "some layer computed in another dtype"
        assert loss.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        results.append((loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (loss, gradient), (loss_bf16, gradient_bf16) = results
    assert loss_bf16 == pytest.approx(loss, rel=5e-3)
    assert 0 < (gradient - gradient_bf16).norm() < 0.03 * gradient.norm()
    logits_BV = config.build(torch.bfloat16)(
        tokens(positions_BS), positions_BS, mask_of(config, positions_BS)
    )
    assert logits_BV.dtype == torch.float32


def copies(calls: Sequence[str]) -> list[str]:
    forbidden = ("clone", "contiguous", "copy", "slice_backward", "select_backward", "repeat")
    return [name for name in calls if any(word in name for word in forbidden)]


@pytest.mark.parametrize("attention", BACKENDS, ids=lambda config: config.kind)
@pytest.mark.parametrize("family", families)
def test_the_attention_path_copies_nothing_forward_or_backward(family: str, attention):
    # One document per row: with several, a backend may assemble its output and gradients once.
    positions_BS = packed(32).repeat(2, 1)
    config = small(family, attention)
    model = config.build()
    x_BSD = torch.randn(2, 32, config.dim, requires_grad=True)
    turns = decoder_module.rotation(positions_BS, config.head_dim, config.rope_theta, config.rope_scaling)
    mask, layer = mask_of(config, positions_BS), model.blocks[0].get_submodule("attention")
    layer(x_BSD, turns, mask)
    with Operators() as operators:
        out_BSD = layer(x_BSD, turns, mask)
        torch.autograd.grad(out_BSD.sum(), (x_BSD, *layer.parameters()))
    assert operators.calls.count("mm") == 12, "forward and backward of four projections were meant to run"
    assert copies(operators.calls) == []


class Mixing(nn.Module):
    """An inner attention without a matrix product, through which all gradients flow."""

    def forward(self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: object) -> Tensor:
        return q_BSHK + k_BSGK.mean(2, keepdim=True) + v_BSGK.mean(2, keepdim=True)


@pytest.mark.parametrize("family", families)
def test_flops_per_token_are_those_of_the_matrix_products(family: str):
    model = small(family).build()
    for block in model.blocks:
        block.get_submodule("attention").inner = Mixing()
    positions_BS = packed(32)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, tokens(positions_BS), positions_BS, tokens(positions_BS, seed=1))[0].backward()
    attention = 6 * 2 * 6 * 16 * 32
    assert model.config.flops_per_token(32) == counter.get_total_flops() / 32 + attention


def test_the_decoder_knows_no_family():
    source = inspect.getsource(decoder_module).lower()
    assert [name for name in ("llama", "qwen") if name in source] == []
