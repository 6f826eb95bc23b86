"""Functions that the tests of single exchanges run on ranks (see ranks.py).

B batch, S tokens, s = S / n tokens on each of n ranks; H query heads, G key/value heads, K head dim;
D model dim, V vocab.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from attention_cases import HEAD_DIM, qkv
from operators import Operators
from parallel_cases import new_trainer, precision, whole
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

from torchtitan_lite.attention import AttentionConfig, Flex, Sdpa
from torchtitan_lite.models import init, loss
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.loss import IGNORE, linear_cross_entropy
from torchtitan_lite.models.registry import resolve
from torchtitan_lite.parallel.apply import CompileConfig, apply
from torchtitan_lite.parallel.context import Chunks, ContextParallel
from torchtitan_lite.parallel.fsdp import own_shard
from torchtitan_lite.parallel.gradients import squared_norm, sum_partial
from torchtitan_lite.parallel.mesh import Degrees, ParallelismConfig, build_mesh
from torchtitan_lite.parallel.recompute import ActivationCheckpointConfig
from torchtitan_lite.parallel.tensor import apply_tensor_parallel, loss_by_tokens, loss_by_vocabulary
from torchtitan_lite.training.optimizer import AdamW

SDPA, ALONE = Sdpa(), Degrees()

# Attention with the sequence split over ranks.


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention, forward and backward, of the tensors of `attention_cases.qkv`."""

    positions_BS: Tensor
    method: Any = "allgather"
    balanced: bool = True
    config: AttentionConfig = SDPA
    window: int | None = None
    heads: tuple[int, int] = (4, 2)
    scale: float | None = None
    dtype: torch.dtype = torch.float64

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, for whole sequences."""
        (batch, seq_len), (n_heads, n_kv_heads) = self.positions_BS.shape, self.heads
        q, k, v = qkv(batch, seq_len, seq_len, n_heads, n_kv_heads, self.dtype)
        generator = torch.Generator().manual_seed(1)
        return q, k, v, torch.randn(q.shape, generator=generator, dtype=self.dtype)


class Part(NamedTuple):
    """One rank's part of the results of an attention."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    bytes_sent: tuple[int, int]
    """Forward and backward."""


def attend(cases: Sequence[Attention]) -> list[Part]:
    return [_attend(case) for case in cases]


def _attend(case: Attention) -> Part:
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    context = ContextParallel(
        method=case.method,
        chunks=Chunks(n_ranks, case.balanced),
        rank=rank,
        group=dist.distributed_c10d._get_default_group(),
    )
    mask = case.config.mask(
        case.positions_BS, queries=context.queries(case.positions_BS.shape[1]), sliding_window=case.window
    )
    q, k, v, dout = (context.shard(x.detach()).requires_grad_() for x in case.tensors())
    inner = context.wrap(case.config.build())
    with Operators() as forward:
        out = inner(q, k, v, mask, scale=case.scale)
    with Operators() as backward:
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert all(type(x) is Tensor for x in (out, dq, dk, dv)), "a result still waits for its exchange"
    return Part(out.detach(), dq, dk, dv, (forward.bytes_sent, backward.bytes_sent))


def attention_bytes(method: str, n_ranks: int, n_tokens: int, heads: tuple[int, int]) -> tuple[int, int]:
    """The bytes that a rank puts into exchanges of float64, forward and backward, counted by hand."""
    n_heads, n_kv_heads = heads
    head = n_tokens // n_ranks * HEAD_DIM * 8
    if method == "allgather":
        return head * 2 * n_kv_heads, head * 2 * n_kv_heads * n_ranks
    both_ways = head * (2 * n_heads + 2 * n_kv_heads)
    return both_ways, both_ways


def block_sizes_of_masks(argv: Sequence[str]) -> set[tuple[int, int]]:
    """The block sizes of the masks that the model gets in a step."""
    trainer, found, make_mask = new_trainer(argv), set(), Flex.mask

    def mask(config: Flex, *args: Any, **options: Any) -> Any:
        found.add(config.blocks)
        return make_mask(config, *args, **options)

    with mock.patch.object(Flex, "mask", mask):
        trainer.stepper.train_step()
    return found


# The loss by shares of the vocabulary, and by tokens.


class Loss(NamedTuple):
    """A loss and its whole gradients."""

    value: Tensor
    n_valid: Tensor
    dx_BSD: Tensor
    dweight_VD: Tensor


SCALE = 0.3
"""The factor on the loss before it is differentiated."""


def loss_inputs(batch: int, seq_len: int, dim: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight, and labels from the whole vocabulary; every fifth label is IGNORE."""
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(batch, seq_len, dim, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    labels_BS = (torch.arange(batch * seq_len) % vocab).view(batch, seq_len)
    labels_BS[:, ::5] = IGNORE
    return x_BSD, weight_VD, labels_BS


def losses(by_vocabulary: bool, cases: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Loss]:
    mesh = build_mesh(Degrees(tensor=dist.get_world_size()), "cpu")["tp"]
    way = loss_by_vocabulary if by_vocabulary else loss_by_tokens
    return [_loss(way, mesh, *case) for case in cases]


def _loss(way: Any, mesh: DeviceMesh, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Loss:
    x_BsD, weight = _tokens_and_rows(mesh, x_BSD, weight_VD)
    value, n_valid = way(linear_cross_entropy, mesh, x_BsD, weight, labels_BS)
    (SCALE * value).backward()
    assert x_BsD.grad is not None and isinstance(weight, DTensor) and isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements
    dx_BSD = DTensor.from_local(x_BsD.grad, mesh, [Shard(1)])
    with torch.no_grad():
        again, _ = way(linear_cross_entropy, mesh, x_BsD, weight, labels_BS)
    assert torch.equal(again, value)
    return Loss(value.detach(), n_valid, whole(dx_BSD), whole(weight.grad))


def _tokens_and_rows(mesh: DeviceMesh, x_BSD: Tensor, weight_VD: Tensor) -> tuple[Tensor, nn.Parameter]:
    x_BsD = x_BSD.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].clone().requires_grad_()
    return x_BsD, nn.Parameter(distribute_tensor(weight_VD, mesh, [Shard(0)]))


def watch_loss(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> tuple[list[tuple[str, int]], int]:
    """The exchanges of the loss on a share of the vocabulary, and the size of its largest tensor."""
    mesh = build_mesh(Degrees(tensor=dist.get_world_size()), "cpu")["tp"]
    x_BsD, weight = _tokens_and_rows(mesh, x_BSD, weight_VD)
    with (
        Operators() as seen,
        mock.patch.object(loss, "_LITTLE_BYTES", 0),
    ):  # so few logits are in several chunks
        value, _ = loss_by_vocabulary(linear_cross_entropy, mesh, x_BsD, cast(DTensor, weight), labels_BS)
        value.backward()
    return seen.sent, seen.largest


def small_model(family: str, **overrides: Any) -> Decoder:
    """A small model in float64, with random weights."""
    config = resolve(family, "debugmodel", overrides=SMALL | overrides)
    return config.build(compute_dtype=torch.float64).double()


SMALL = {
    "n_layers": 2, "dim": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "ffn_dim": 20, "vocab_size": 40
}  # fmt: skip
TOKENS_BS = torch.tensor([[0, 19, 20, 39, 7, 25, 7, 7], [10, 9, 29, 30, 0, 1, 38, 39]])
"""Tokens from every share of a vocabulary of 40, with the first and last of each; some occur twice."""


def look_up(upstream_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of this rank's tokens, its rows of the embedding's gradient, and the whole gradient."""
    model = small_model("llama3")
    mesh = build_mesh(Degrees(tensor=dist.get_world_size()), "cpu")["tp"]
    apply_tensor_parallel(model, mesh, loss_parallel=True)
    x_BsD = model.embedding(TOKENS_BS)
    x_BsD.backward(upstream_BSD.chunk(mesh.size(), dim=1)[mesh.get_local_rank()])
    gradient = model.embedding.weight.grad
    assert isinstance(gradient, DTensor)
    assert type(x_BsD) is Tensor, "the vectors still wait for their exchange"
    return x_BsD.detach(), gradient.to_local(), whole(gradient)


def local_shapes(family: str) -> dict[str, tuple[torch.Size, torch.Size]]:
    """The whole and the local shape of every parameter under tensor parallel."""
    model = small_model(family)
    mesh = build_mesh(Degrees(tensor=dist.get_world_size()), "cpu")["tp"]
    apply_tensor_parallel(model, mesh, loss_parallel=True)
    return {
        name: (p.shape, p.to_local().shape)
        for name, p in model.named_parameters()
        if isinstance(p, DTensor) and p.requires_grad
    }


def initial_weights(
    family: str, overrides: Mapping[str, Any], degrees: Degrees
) -> tuple[dict[str, Tensor], int, int]:
    """The whole weights of a model that was made in shards, and how many numbers this rank drew and has."""
    with torch.device("meta"):
        model = resolve(family, "debugmodel", overrides=overrides).build()
    apply(model, mesh=build_mesh(degrees, "cpu"))
    model.to_empty(device="cpu")
    with mock.patch.object(init, "fill_normal", wraps=init.fill_normal) as fill:
        init_weights(model, 3, own_shard)
    n_drawn = sum(call.args[0].numel() for call in fill.call_args_list)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    n_held = sum(own_shard(p)[0].numel() for p in matrices)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}, n_drawn, n_held


# Recompute and compile.


class Pass(NamedTuple):
    """A model's loss and gradients, and the operators and graphs that computed them."""

    loss: Tensor
    gradients: dict[str, Tensor]
    """The gradients of whole parameters."""
    forward_calls: list[str]
    """The names of the operators; empty if compiled."""
    backward_calls: list[str]
    n_graphs: int
    """The graphs that torch.compile has compiled."""
    graph_breaks: list[str]


def run_pass(
    recompute: ActivationCheckpointConfig,
    compile: CompileConfig,
    degrees: Degrees = ALONE,
    method: Any = "allgather",
    config: AttentionConfig = SDPA,
    n_layers: int = 2,
) -> Pass:
    """A forward and a backward of a small model, on packed documents."""
    torch._dynamo.reset()
    counters.clear()
    model = small_model("qwen3", n_layers=n_layers)
    model.config = replace(model.config, attention=config)
    for block in model.blocks:
        block.attention.inner = config.build()
    mesh = build_mesh(degrees, "cpu") if dist.is_initialized() else None
    parallelism = ParallelismConfig(context_parallel_method=method)
    context = apply(model, mesh=mesh, parallelism=parallelism, recompute=recompute, compile=compile)
    positions_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    mask = config.mask(positions_BS, queries=context.queries(positions_BS.shape[1]))
    tokens_BS, own_BS, labels_BS = (context.shard(x) for x in (TOKENS_BS, positions_BS, TOKENS_BS.flip(1)))
    forward, backward = Operators(), Operators()
    with precision(double=True):
        # torch.compile does not compile code that runs under a mode.
        with nullcontext() if compile.enable else forward:
            loss, _ = model(tokens_BS, own_BS, mask, labels_BS)
        with nullcontext() if compile.enable else backward:
            loss.backward()
    sum_partial(model.parameters())
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    breaks = list(counters["graph_break"])
    n_graphs = counters["stats"]["unique_graphs"]
    return Pass(loss.detach(), gradients, forward.calls, backward.calls, n_graphs, breaks)


# Weights in shards.


class Gathers(Operators):
    """Records events in order: "gather", or the number of a block when its attention begins."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.events: list[str | int] = []
        for number, block in enumerate(model.blocks):
            block.get_submodule("attention").register_forward_pre_hook(
                lambda *_, number=number: self.events.append(number)
            )

    def __torch_dispatch__(self, func: Any, *rest: Any) -> Any:
        if func.namespace == "c10d" and "allgather" in func.overloadpacket.__name__:
            self.events.append("gather")
        return super().__torch_dispatch__(func, *rest)


def gathers_of_a_step(n_layers: int) -> tuple[list[str | int], list[str | int]]:
    """The events of a forward and a backward with full recompute."""
    model = small_model("qwen3", n_layers=n_layers)
    recompute = ActivationCheckpointConfig(mode="full")
    mesh = build_mesh(Degrees(shard=dist.get_world_size()), "cpu")
    apply(model, mesh=mesh, recompute=recompute)
    positions_BS = torch.arange(8).expand(2, -1)
    mask = model.config.attention.mask(positions_BS)
    with Gathers(model) as seen:
        loss, _ = model(TOKENS_BS, positions_BS, mask, TOKENS_BS)
        n_forward = len(seen.events)
        loss.backward()
    return seen.events[:n_forward], seen.events[n_forward:]


def updates(n_steps: int) -> tuple[list[Tensor], list[Tensor], set[type]]:
    """Weights and state of uneven shards after `n_steps` of our AdamW, and of torch's.

    The third result is the types of the tensors that our AdamW updates.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: list[list[Tensor]] = []
    seen: set[type] = set()
    module = sys.modules[torch.optim.Adam.__module__]  # torch.optim has a function of the same name
    update = module.adam

    def watched(*lists: Any, **options: Any) -> None:
        seen.update(type(x) for x in tree_leaves(lists))
        update(*lists, **options)

    for is_ours in (True, False):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,))]
        parameters = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in weights]
        optimizer = AdamW(lr=0.1).build(
            dict(zip("ab", parameters, strict=True)), {"a": "matrix", "b": "vector"}
        )
        if not is_ours:
            optimizer = torch.optim.AdamW(optimizer.param_groups)
        for _ in range(n_steps):
            for p in parameters:
                whole_gradient = torch.randn(p.shape, generator=generator)
                p.grad = distribute_tensor(whole_gradient, mesh, [Shard(0)])
            with mock.patch.object(module, "adam", watched) if is_ours else nullcontext():
                optimizer.step()
        state = [x for p in parameters for x in optimizer.state[p].values()]
        found.append([whole(x) for x in (*parameters, *state)])
    return found[0], found[1], seen


# Gradients in shards.

PLACEMENTS: dict[str, tuple[tuple[str, ...], tuple[Placement, ...]]] = {
    "whole on every rank": (("outer", "inner"), (Replicate(), Replicate())),
    "sharded over both": (("outer", "inner"), (Shard(0), Shard(1))),
    "sharded over both, on one dim": (("outer", "inner"), (Shard(0), Shard(0))),
    "sharded over the inner": (("outer", "inner"), (Replicate(), Shard(1))),
    "sharded over the outer": (("outer", "inner"), (Shard(0), Replicate())),
    "on the inner alone": (("inner",), (Shard(0),)),
    "whole, on the inner alone": (("inner",), (Replicate(),)),
}
"""Axes of a mesh of 2 x 2, and the placements of a tensor on these axes."""


def gradient_of(name: str) -> Tensor:
    """A gradient of seven rows, which no number of ranks divides."""
    generator = torch.Generator().manual_seed(list(PLACEMENTS).index(name))
    return torch.randn(7, 5, generator=generator, dtype=torch.float64)


def squared_norms(names: Sequence[str]) -> float:
    """The squared norm of all gradients, summed over ranks. One gradient is a plain tensor."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    parameters = [nn.Parameter(torch.zeros(3, dtype=torch.float64)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.ones(3, dtype=torch.float64)  # the other parameter has no gradient
    for name in names:
        axes, placements = PLACEMENTS[name]
        gradient = distribute_tensor(gradient_of(name), mesh[axes], placements)
        parameters.append(nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    square = squared_norm(parameters, dist.get_world_size())
    dist.all_reduce(square)
    return square.item()


def summed() -> tuple[list[Tensor], list[tuple[str, int]]]:
    """The summed gradients of two whole weights and a sharded one, and the exchanges.

    Each rank has a term of the gradient of a whole weight.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    parameters = []
    whole_in_terms, sharded = (Replicate(), Partial()), (Shard(0), Shard(0))
    for size, (placement, term) in ((3, whole_in_terms), (4, sharded), (5, whole_in_terms)):
        parameters.append(nn.Parameter(DTensor.from_local(torch.zeros(size), mesh, [placement])))
        own = torch.full((size,), float(dist.get_rank() + size))
        parameters[-1].grad = DTensor.from_local(own, mesh, [term], run_check=False)
    with Operators() as seen:
        sum_partial(parameters)
    assert all(p.grad.placements == p.placements for p in parameters if isinstance(p.grad, DTensor))
    return [whole(p.grad) for p in parameters if p.grad is not None], seen.sent
