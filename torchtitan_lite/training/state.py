"""What a run trains: the model, its optimizer, and how far both have come."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.checkpoint.randomness import set_random_state
from torchtitan_lite.checkpoint.restore import Found, load
from torchtitan_lite.checkpoint.save import Snapshot
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import Loader
from torchtitan_lite.launch.background import patiently
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.parallel.apply import apply, prepare_compile
from torchtitan_lite.parallel.context import ContextParallel
from torchtitan_lite.parallel.fsdp import own_shard
from torchtitan_lite.parallel.mesh import build_mesh
from torchtitan_lite.training.corpus import Corpus
from torchtitan_lite.training.optimizer import build_optimizer, fill_state
from torchtitan_lite.training.record import Record, load_initial, pieces


class TrainState:
    """The model, the optimizer, the place in the data, and the counts of steps and tokens.

    Raises ConfigError, before the model is built, when the step to go on from is another run's.

    Args:
        alive: called often: this rank does not hang.
        resumed: the step to go on from.
        initial: the step whose model a new run starts with, or a folder of Hugging Face's.
    """

    def __init__(
        self,
        job: JobConfig,
        world: World,
        corpus: Corpus,
        alive: Callable[[], None] = lambda: None,
        *,
        resumed: Found | None = None,
        initial: Found | Path | None = None,
    ) -> None:
        degrees, size = job.parallelism.degrees(world.size), job.training.local_batch_size
        share = degrees.data_rank(world.rank), degrees.data
        self.batches = Loader(corpus.samples, job.debug.seed, size, *share, n_workers=job.data.num_workers)
        self.record = Record(job, world, corpus.shards, corpus.tokenizer)
        self.notes = self.record.check(resumed) if resumed else []
        """What there is to say of the step or the weights that the run begins with."""
        self.notes += self.record.check_initial(initial) if initial else []
        self.model, self.context = build_model(job, world, alive, draw=resumed is None and initial is None)
        # Of the shards: a module has whole weights in their place for as long as those are gathered.
        self.parameters = dict(self.model.named_parameters())
        groups = {name: row.group for name, row in self.model.config.rows.items()}
        self.optimizer = build_optimizer(self.parameters, job.optimizer, groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # which the schedule scales
        self.step = self.n_tokens_seen = 0
        self.resumed_step = None if resumed is None else resumed.state.step
        self.validated = -1
        """The step that was validated last."""
        if resumed is not None:
            self._go_on(resumed, world.saving, alive)
        elif initial is not None:
            patiently(lambda: load_initial(initial, job.decoder, self.parameters, world.saving), alive)

    @property
    def began(self) -> int:
        """Steps done before this start."""
        return self.resumed_step or 0

    def _go_on(self, found: Found, ranks: World, alive: Callable[[], None]) -> None:
        """Take over a step: weights, optimizer, position and generators; not the weights of an end."""
        state = found.state
        if not state.model_only:
            if state.step > 0:  # before the first step there is no state
                fill_state(self.optimizer)
            own = pieces(self.parameters, self.optimizer if state.step > 0 else None)
            patiently(lambda: load(found, own, ranks, "checkpoint.folder"), alive)
        self.step, self.n_tokens_seen, self.validated = state.step, state.n_tokens_seen, state.validated
        if self.record.has_order_of(state):
            self.batches.consumed_samples = state.consumed_samples
        if found.random is not None:
            set_random_state(found.random)

    def check_optimizer(self, name: str) -> None:
        """Raise ConfigError if the optimizer `name` keeps state that no checkpoint can hold."""
        for state in self.optimizer.state.values():
            if lacking := [key for key, value in state.items() if not isinstance(value, Tensor)]:
                rule = f"keeps {lacking[0]} in its state, which is no tensor, so no checkpoint can hold it"
                remedy = "have the optimizer keep tensors, or set checkpoint.enable to false"
                raise ConfigError([Problem("optimizer.name", name, rule, remedy)])

    def snapshot(self, *, is_done: bool) -> Snapshot:
        """What is saved of the step that was done last; `is_done`: the run has no more to do."""
        return self.record.snapshot(
            self.parameters,
            self.optimizer,
            step=self.step,
            n_tokens_seen=self.n_tokens_seen,
            consumed_samples=self.batches.consumed_samples,
            validated=self.validated,
            is_done=is_done,
        )


def build_model(
    job: JobConfig, world: World, alive: Callable[[], None], *, draw: bool
) -> tuple[Decoder, ContextParallel]:
    """A decoder with float32 weights, of which a rank holds and draws its shards alone.

    Without `draw` its weights are yet to come. Beside it, what is to be done with its sequences.
    """
    degrees, device = job.parallelism.degrees(world.size), torch.device(job.device)
    with torch.device("meta"):
        model = job.decoder.build(compute_dtype=job.training.compute_dtype)
    context = apply(
        model,
        mesh=build_mesh(degrees, device.type) if dist.is_initialized() else None,
        compute_dtype=job.training.compute_dtype,
        parallelism=job.parallelism,
        recompute=job.activation_checkpoint,
        compile=job.compile,
        offload=job.training.enable_cpu_offload,
    )
    kind, head_dim = job.decoder.attention.kind, job.decoder.head_dim
    prepare_compile(job.compile, device=device.type, attention=kind, head_dim=head_dim)
    model.to_empty(device="cpu" if job.training.enable_cpu_offload else device)

    def shard(parameter: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        alive()
        return own_shard(parameter)

    if draw:
        init_weights(model, job.debug.seed, shard)
    return model, context
