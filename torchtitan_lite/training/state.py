"""The state of a run, which checkpoints save: model, optimizer, and position in steps, tokens and data."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.checkpoint.restore import VerifiedStep, load
from torchtitan_lite.checkpoint.save import Snapshot
from torchtitan_lite.checkpoint.state import State
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import Loader
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.parallel.apply import apply, compile_attention
from torchtitan_lite.parallel.context import ContextParallel
from torchtitan_lite.parallel.fsdp import own_shard
from torchtitan_lite.parallel.mesh import build_mesh
from torchtitan_lite.training.corpus import Corpus
from torchtitan_lite.training.optimizer import build_optimizer, create_state
from torchtitan_lite.training.record import Record, Start, load_initial, pieces


class TrainState:
    """The model, the optimizer, the loader with its position, and the counts of steps and tokens.

    Raises ConfigError, before the model is built, if `start` does not fit the run.
    """

    def __init__(self, job: JobConfig, world: World, corpus: Corpus, start: Start) -> None:
        resumed, initial = start.resumed, start.initial
        degrees, size = job.parallelism.degrees(world.size), job.training.local_batch_size
        self.batches = Loader(
            corpus.samples,
            job.debug.seed,
            size,
            degrees.data_rank(world.rank),
            degrees.data,
            n_ahead=job.training.accumulation(degrees.data),
            pin=torch.device(job.device).type == "cuda",
        )
        self.record = Record(job, world, corpus.shards, corpus.tokenizer)
        self.notes = self.record.check(resumed) if resumed else []
        """The lines to print about the checkpoint or the weights that the run starts from."""
        self.notes += self.record.check_initial(initial) if initial else []
        self.model, self.context = build_model(job, world, draw=not (resumed or initial))
        # This rank's shards: while FSDP has gathered a module's weights, the module holds whole weights.
        self.parameters = dict(self.model.named_parameters())
        groups = {name: row.group for name, row in self.model.config.rows.items()}
        self.optimizer = build_optimizer(self.parameters, job.optimizer, groups)
        self.step = self.n_tokens_seen = 0
        self.resumed_step = None if resumed is None else resumed.state.step
        self.validated = -1
        """The step of the last validation; -1 before the first validation."""
        if resumed is not None:
            self._resume(resumed, world)
        elif initial is not None:
            world.patiently(lambda saving: load_initial(initial, job.decoder, self.parameters, saving))

    @property
    def steps_before(self) -> int:
        """The number of steps of the run that were done before this process started."""
        return self.resumed_step or 0

    def _resume(self, found: VerifiedStep, world: World) -> None:
        """Load the checkpoint `found`. If it holds only the model, the run is over: no tensor is loaded."""
        state = found.state
        if not state.model_only:
            if state.step > 0:  # before the first step an optimizer has no state
                create_state(self.optimizer)
            own = pieces(self.parameters, self.optimizer if state.step > 0 else None)
            world.patiently(lambda saving: load(found, own, saving))
        self.step, self.n_tokens_seen, self.validated = state.step, state.n_tokens_seen, state.validated
        if self.record.has_order_of(state):
            self.batches.consumed_samples = state.consumed_samples

    def check_optimizer(self, name: str) -> None:
        """Raise ConfigError if the optimizer `name` has state that is no tensor and cannot be saved."""
        for state in self.optimizer.state.values():
            if lacking := [key for key, value in state.items() if not isinstance(value, Tensor)]:
                rule = f"keeps {lacking[0]} in its state, which is no tensor, so no checkpoint can hold it"
                remedy = "have the optimizer keep tensors, or set checkpoint.enable to false"
                raise ConfigError([Problem("optimizer.name", name, rule, remedy)])

    def snapshot(self, *, is_done: bool) -> Snapshot:
        """Return the content of a checkpoint: only the weights if `is_done` and `last_save_model_only`."""
        record, config = self.record, self.record.job.checkpoint
        model_only = config.last_save_model_only and is_done
        # Before the first step an optimizer has no state, and only the optimizer knows how to create it.
        optimizer = self.optimizer if self.optimizer.state and not model_only else None
        found = pieces(self.parameters, optimizer)
        if model_only:
            dtype = getattr(torch, config.export_dtype)
            found = {name: replace(piece, local=piece.local.cpu().to(dtype)) for name, piece in found.items()}
        state = State(
            step=self.step,
            n_tokens_seen=self.n_tokens_seen,
            consumed_samples=self.batches.consumed_samples,
            validated=self.validated,
            model_only=model_only,
            identity=record.identity,
            schedule=record.schedule,
            config=record.config,
        )
        return Snapshot(pieces=found, state=state, made=record.made)


def build_model(job: JobConfig, world: World, *, draw: bool) -> tuple[Decoder, ContextParallel]:
    """Build a decoder with float32 weights, and the object that splits its sequences between ranks.

    Each rank holds only its own shards. If `draw` is true, the initial weights are drawn. Otherwise the
    weights have no values yet.
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
    compile_attention(job.compile, job.decoder, device.type)
    model.to_empty(device="cpu" if job.training.enable_cpu_offload else device)

    def shard(parameter: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        world.alive()
        return own_shard(parameter)

    if draw:
        init_weights(model, job.debug.seed, shard)
    return model, context
