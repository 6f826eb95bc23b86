"""The changes that parallelism, recompute and compile make to the finished single-device model, in order."""

import math
import shutil
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_lite.attention import kernel_cache
from torchtitan_lite.attention.portable.native import CXX, compile_kernel, forget_kernels
from torchtitan_lite.config.load import ConfigError, Problem, near
from torchtitan_lite.models.decoder import Decoder, DecoderConfig
from torchtitan_lite.parallel.context import Chunks, ContextParallel
from torchtitan_lite.parallel.mesh import AXES, Degrees, ParallelismConfig, weights_mesh
from torchtitan_lite.parallel.recompute import ActivationCheckpointConfig, apply_recompute

# The functions below import tensor.py and fsdp.py, and so torch's DTensor, which takes half a second. Neither
# --help nor --dry-run nor an error in the configuration needs a DTensor.


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """The options for compiling the model."""

    enable: bool = False
    """Compile each block with torch.compile. The start is slower, and the steps are faster."""
    backend: str = "inductor"
    """Backend of torch.compile."""

    @property
    def uses_inductor(self) -> bool:
        """True if inductor compiles the model."""
        return self.enable and self.backend == "inductor"

    def problems(self, key: str, device: str | None = None) -> list[Problem]:
        """Return a problem if torch lacks the backend, or if inductor cannot compile for `device`.

        Inductor needs a folder that code can be loaded from, and on a CPU a C++ compiler. In a dry run, which
        compiles nothing, `device` is None.
        """
        if not self.enable:
            return []
        if fault := kernel_cache.fault(device if self.uses_inductor else None):
            rule, remedy = fault
            return [Problem(f"{key}.enable", True, rule, f"{remedy}, or do not compile", ("job.device",))]
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            rule = "is not a backend of torch.compile"
            remedy, reads = near(self.backend, known), (f"{key}.enable",)
            return [Problem(f"{key}.backend", self.backend, rule, remedy, reads)]
        if self.uses_inductor and device == "cpu" and not shutil.which(CXX):
            rule = f"needs a C++ compiler, and {CXX} is not on PATH"
            remedy, reads = "install one, name one in CXX, or set compile.enable = false", ("job.device",)
            return [Problem(f"{key}.enable", True, rule, remedy, reads)]
        return []


_ALONE, _KEEP_ALL, _EAGER = ParallelismConfig(), ActivationCheckpointConfig(), CompileConfig()


def apply(
    model: Decoder,
    *,
    mesh: DeviceMesh | None = None,
    compute_dtype: torch.dtype = torch.float32,
    parallelism: ParallelismConfig = _ALONE,
    recompute: ActivationCheckpointConfig = _KEEP_ALL,
    compile: CompileConfig = _EAGER,
    offload: bool = False,
) -> ContextParallel:
    """Change `model` in place, on any device. Return how its sequences are split by context parallel.

    1. Tensor parallel rewrites the projections. Every later step finds them rewritten.
    2. Context parallel wraps the attention of each block, which now has only this rank's heads.
    3. Recompute wraps a block's forward, including its exchanges between ranks.
    4. Compile freezes a block, so it comes after every change inside the block. Each block is compiled
       alone, so that all blocks share one graph and the head's chunked loss stays eager.
    5. FSDP acts around the call of a block, and shards this rank's share of the weights.
    """
    context = ContextParallel()
    if mesh is not None and mesh["tp"].size() > 1:
        from torchtitan_lite.parallel.tensor import apply_tensor_parallel

        loss_parallel = not parallelism.disable_loss_parallel
        apply_tensor_parallel(model, mesh["tp"], loss_parallel=loss_parallel)
    if mesh is not None and mesh["cp"].size() > 1:
        cp, method = mesh["cp"], parallelism.context_parallel_method
        # Ulysses computes on all tokens, so there is nothing to balance.
        is_balanced = method == "allgather" and parallelism.context_parallel_load_balancer == "headtail"
        chunks = Chunks(cp.size(), is_balanced)
        context = ContextParallel(
            method=method, chunks=chunks, rank=cp.get_local_rank(), group=cp.get_group()
        )
        model.wrap_attention(context.wrap)
    if mesh is not None and mesh["tp"].size() * mesh["cp"].size() > 1:
        model.register_forward_pre_hook(_refuse_to_predict, with_kwargs=True)
    apply_recompute(model.layers, recompute, by_operator=compile.enable)
    if compile.enable:
        for layer in model.layers:
            layer.compile(backend=compile.backend)
    if mesh is not None and (mesh.size() > mesh["tp"].size() or offload):
        from torchtitan_lite.parallel.fsdp import apply_fsdp

        apply_fsdp(
            model,
            weights_mesh(mesh),
            compute_dtype=compute_dtype,
            reshard=parallelism.fsdp_reshard_after_forward != "never",
            offload=offload,
        )
    return context


def model_problems(config: DecoderConfig, degrees: Degrees) -> list[Problem]:
    """Return the problems of the model of a plugin's family.

    A parameter may have no row in the table of parameters, or a module may not suit tensor parallel.
    """
    try:
        with torch.device("meta"):
            model = config.build()
        if degrees.tensor > 1:
            from torchtitan_lite.parallel.tensor import check_readers

            check_readers(model)
    except ConfigError as error:
        return list(error.problems)
    return []


def compile_attention(config: CompileConfig, model: DecoderConfig, device: str) -> None:
    """Compile the attention kernel for CPUs if inductor compiles the run. Other runs use torch's kernel."""
    if device == "cpu":
        forget_kernels()  # kernels of an earlier trainer in this process
        if config.uses_inductor:
            compile_kernel(model.head_dim)


def plan(
    model: DecoderConfig,
    degrees: Degrees,
    *,
    device: str,
    parallelism: ParallelismConfig,
    recompute: ActivationCheckpointConfig,
    compile: CompileConfig,
    offload: bool,
    optimizer_numbers: int | None,
) -> list[str]:
    """Return lines of text on what `apply` does to a model of the config `model`. No rank need be running.

    Args:
        optimizer_numbers: the numbers that the optimizer keeps for each weight; None: not known.
    """
    axes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, degrees.sizes, strict=True))
    total, largest, tp = model.n_params, _largest_share(model, degrees), degrees.tensor
    projections, ends, loss = [], [], ["in chunks"]
    attention = [model.attention.implementation(device).name]
    blocks = [f"recompute {recompute.described()}"]
    if tp > 1:
        projections = [f"{_projection_words(model)}, norms by tokens (tp {tp})"]
        ends = [f"by vocabulary (tp {tp})"]
        share = "its own tokens" if parallelism.disable_loss_parallel else "its share of the vocabulary"
        loss.append(f"each rank {share} (tp {tp})")
    if degrees.context > 1:
        balance = f"keys and values gathered, {parallelism.context_parallel_load_balancer} balance"
        is_ulysses = parallelism.context_parallel_method == "ulysses"
        way = "heads for tokens by ulysses" if is_ulysses else balance
        attention.append(f"{way} (cp {degrees.context})")
    if compile.enable:
        blocks.append(f"compiled by {compile.backend}")
    if degrees.replicate * degrees.fsdp > 1 or offload:
        copies = f", {degrees.replicate} copies" if degrees.replicate > 1 else ""
        kept = "kept" if parallelism.fsdp_reshard_after_forward == "never" else "dropped"
        blocks += [f"FSDP over {degrees.fsdp}{copies}", f"gathered weights {kept} after forward"]
        ends.append("one FSDP group with the last norm, kept until the backward")
    if offload:
        blocks.append("shards in host memory")
    rows = {
        "mesh": [f"{degrees.world} rank{'s' if degrees.world > 1 else ''} = {axes}"],
        "parameters": [f"{total:,} in all, {largest:,} per rank ({largest / total:.1%})"],
        "memory": [_memory_words(largest, optimizer_numbers)],
        "projections": projections,
        "attention": attention,
        "blocks": blocks,
        "embedding and head": ends,
        "loss": loss,
    }
    return [f"{part}: {'; '.join(words)}" for part, words in rows.items() if words]


def _projection_words(model: DecoderConfig) -> str:
    """Return the names of the matrices that tensor parallel splits by columns, and by rows, as text."""
    words = []
    for dim, way in ((0, "by columns"), (1, "by rows")):
        rows = [row for row in model.rows.values() if row.group == "matrix" and row.shard_dim == dim]
        names = dict.fromkeys(row.pattern.split(".")[-2] for row in rows)
        words += [f"{' '.join(names)} {way}"] if names else []
    return ", ".join(words)


def _largest_share(model: DecoderConfig, degrees: Degrees) -> int:
    """Return the number of weights of the rank that has the most."""
    return sum(
        _largest_shard(shape, model.rows[name].shard_dim, degrees) for name, shape in model.shapes.items()
    )


def _memory_words(n_weights: int, optimizer_numbers: int | None) -> str:
    """Return the memory for `n_weights` weights, their gradients and the optimizer's state, as text."""
    n_bytes = n_weights * torch.float32.itemsize  # weights, gradients and state are float32
    unit, own = ("MiB", n_bytes / 2**20) if n_bytes < 2**30 else ("GiB", n_bytes / 2**30)
    parts = {"weights": own, "gradients": own}
    if optimizer_numbers is not None:
        parts["optimizer"] = optimizer_numbers * own
    sizes = " + ".join(f"{name} {size:,.1f}" for name, size in parts.items())
    unknown = "" if "optimizer" in parts else "; the optimizer's state comes on top"
    return f"{sum(parts.values()):,.1f} {unit} per rank = {sizes}{unknown}"


def _largest_shard(shape: torch.Size, dim: int | None, degrees: Degrees) -> int:
    """Return the number of elements in a parameter's largest shard. Tensor parallel splits along `dim`."""
    sizes = list(shape)
    if dim is not None:
        sizes[dim] //= degrees.tensor
    sizes[0] = -(-sizes[0] // degrees.fsdp)
    return math.prod(sizes)


def _refuse_to_predict(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Raise AssertionError if a forward of a split model has no labels, and so would return logits.

    Only one rank has the last token of a row (cp), or each rank has only a part of the vocabulary (tp).
    """
    labels = args[3] if len(args) > 3 else kwargs.get("labels_BS")
    assert labels is not None, "a model split by tp or cp has a loss, and no logits"
