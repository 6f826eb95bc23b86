"""N ranks give the losses, gradients and weights of one rank, for every combination."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
from programs import words_of

GLOBAL_BATCH = 8
SMALL = {"n_layers": 2, "dim": 32, "head_dim": 8, "ffn_dim": 48}
TINY = {"n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "dim": 16, "ffn_dim": 24}
TIED, UNTIED = "qwen3", "llama3"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A mesh, and the training that runs on it."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    method: str = "allgather"
    attention: str = "sdpa"
    accumulation: int = 1
    recompute: str = "none"
    family: str = TIED
    """qwen3 has tied embeddings and QK norm; llama3 has neither."""
    overrides: tuple[tuple[str, object], ...] = tuple(SMALL.items())
    flags: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def alone(self) -> "Cell":
        """The same training on one rank."""
        return Cell(attention=self.attention, family=self.family, overrides=self.overrides)

    def words(self) -> list[str]:
        """The options of the training."""
        local = GLOBAL_BATCH // (self.replicate * self.shard * self.accumulation)
        options = {
            "model.name": self.family,
            "model.attention": self.attention,
            "model.overrides": dict(self.overrides),
            "training.local-batch-size": local,
            "parallelism.data-parallel-replicate-degree": self.replicate,
            "parallelism.data-parallel-shard-degree": self.shard,
            "parallelism.context-parallel-degree": self.context,
            "parallelism.context-parallel-method": self.method,
            "parallelism.tensor-parallel-degree": self.tensor,
            "activation-checkpoint.mode": self.recompute,
        }
        return [*words_of(options), *self.flags]


def over(overrides: Mapping[str, object], **changes: object) -> tuple[tuple[str, object], ...]:
    return tuple({**overrides, **changes}.items())


MESHES = {
    "fsdp 2": Cell(shard=2),
    "hsdp 2x2": Cell(replicate=2, shard=2),
    "tp 2": Cell(tensor=2),
    "cp 2 allgather": Cell(context=2),
    "cp 2 ulysses": Cell(context=2, method="ulysses"),
    "cp 4": Cell(context=4),
    "fsdp 2 x tp 2": Cell(shard=2, tensor=2),
    "cp 2 x tp 2": Cell(context=2, tensor=2),
    "cp 2 ulysses x tp 2": Cell(context=2, tensor=2, method="ulysses"),
    "fsdp 2 x cp 2": Cell(shard=2, context=2),
    "fsdp 2 x tp 2 x cp 2": Cell(shard=2, tensor=2, context=2),
}

FULL, SELECTIVE = "full", "selective"
CELLS = {
    "fsdp 2": Cell(shard=2, family=UNTIED, accumulation=2, attention="flex"),
    "replicate 2": Cell(replicate=2, accumulation=2, recompute=FULL, attention="varlen"),
    "hsdp 2x2": Cell(replicate=2, shard=2, accumulation=2, recompute=SELECTIVE, family=UNTIED),
    "tp 2": Cell(tensor=2, accumulation=2, recompute=SELECTIVE, attention="flex"),
    "cp 2 allgather sdpa": Cell(context=2, family=UNTIED),
    "cp 2 allgather flex": Cell(context=2, attention="flex", recompute=SELECTIVE),
    "cp 2 allgather varlen": Cell(
        context=2, attention="varlen", accumulation=2, family=UNTIED, recompute=FULL
    ),
    "cp 2 ulysses sdpa": Cell(context=2, method="ulysses", accumulation=2, recompute=SELECTIVE),
    "cp 2 ulysses flex": Cell(context=2, method="ulysses", attention="flex", family=UNTIED, recompute=FULL),
    "cp 2 ulysses varlen": Cell(context=2, method="ulysses", attention="varlen"),
    "cp 4": Cell(context=4, attention="varlen", recompute=SELECTIVE, family=UNTIED),
    "fsdp 2 x tp 2": Cell(shard=2, tensor=2, accumulation=2, recompute=FULL),
    "fsdp 2 x tp 2, untied": Cell(shard=2, tensor=2, family=UNTIED, attention="varlen", recompute=SELECTIVE),
    "cp 2 x tp 2": Cell(context=2, tensor=2, attention="flex", family=UNTIED, recompute=FULL),
    "cp 2 ulysses x tp 2": Cell(context=2, tensor=2, method="ulysses", attention="varlen", accumulation=2),
    "fsdp 2 x cp 2": Cell(shard=2, context=2, attention="flex", accumulation=2, recompute=FULL),
    "replicate 2 x cp 2 ulysses": Cell(replicate=2, context=2, method="ulysses", recompute=FULL),
    "replicate 2 x tp 2": Cell(replicate=2, tensor=2, attention="flex", family=UNTIED),
    "fsdp 2 x tp 2 x cp 2": Cell(shard=2, tensor=2, context=2, accumulation=2),
}
"""Every mesh and every attention."""

WINDOW = over(SMALL, sliding_window=9)
NOT_BALANCED = ("--parallelism.context-parallel-load-balancer", "none")
NO_LOSS_PARALLEL = ("--parallelism.disable-loss-parallel",)
SPECIAL = {
    "load balancer none": Cell(context=2, flags=NOT_BALANCED),
    "load balancer none, flex": Cell(context=4, attention="flex", flags=NOT_BALANCED),
    "sliding window, sdpa": Cell(context=2, overrides=WINDOW),
    "sliding window, flex": Cell(context=4, attention="flex", overrides=WINDOW),
    "sliding window, varlen": Cell(context=2, attention="varlen", overrides=WINDOW),
    "sliding window, ulysses": Cell(context=2, method="ulysses", attention="varlen", overrides=WINDOW),
    "no loss parallel, tied": Cell(tensor=2, flags=NO_LOSS_PARALLEL),
    "no loss parallel, untied": Cell(tensor=2, shard=2, family=UNTIED, flags=NO_LOSS_PARALLEL),
    "weights kept until the backward": Cell(
        shard=2, flags=("--parallelism.fsdp-reshard-after-forward", "never")
    ),
    "cpu offload": Cell(shard=2, accumulation=2, flags=("--training.enable-cpu-offload",)),
    "every second block recomputed": Cell(
        shard=2, recompute=SELECTIVE, flags=("--activation-checkpoint.selective-ac-option", "2")
    ),
    "one key head for all": Cell(context=2, overrides=over(SMALL, n_kv_heads=1)),
    "one key head for all, flex": Cell(context=4, attention="flex", overrides=over(SMALL, n_kv_heads=1)),
    "sizes that shards do not divide": Cell(shard=4, overrides=over(SMALL, dim=30, ffn_dim=50)),
    "small blocks of flex": Cell(context=2, attention="flex", flags=("--model.attention.block-size", "16")),
}

WHOLE = over({})
"""The debug model with all its layers."""
WHOLE_MODELS = {
    "fsdp 2, whole": Cell(shard=2, overrides=WHOLE, recompute=SELECTIVE),
    "tp 2, whole": Cell(tensor=2, overrides=WHOLE, family=UNTIED, attention="varlen"),
    "cp 2 allgather, whole": Cell(context=2, overrides=WHOLE, accumulation=2, recompute=FULL),
}
ALL = {**CELLS, **SPECIAL, **WHOLE_MODELS}
IN_FLOAT32 = {**CELLS, **WHOLE_MODELS}
QUICK_IN_FLOAT32 = ("hsdp 2x2", "tp 2", "cp 2 allgather varlen", "cp 2 ulysses flex")
"""Each axis of the mesh, each attention and each way of context parallel once."""
RUNS = [
    *(
        pytest.param(
            name, False, id=f"float32-{name}", marks=[pytest.mark.slow] * (name not in QUICK_IN_FLOAT32)
        )
        for name in IN_FLOAT32
    ),
    *(pytest.param(name, True, id=f"float64-{name}") for name in (*CELLS, *SPECIAL)),
]


@pytest.fixture(scope="module")
def words(texts: Path) -> list[str]:
    """The options of all trainings, with samples of 64 tokens and several documents."""
    options = {
        "data.validation-fraction": 0.1,
        "training.global-batch-size": GLOBAL_BATCH,
        "lr-scheduler.warmup-steps": 2,
        "validation.enable": "true",
        "validation.freq": 1,
        "validation.steps": -1,
    }
    return cases.run_of(texts, options)


Reference = Callable[[Cell, int, bool], Path]


@pytest.fixture(scope="module")
def reference(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The file with the results of a cell's training on one rank, in this process; computed once."""
    folder = tmp_path_factory.mktemp("references")
    known: dict[tuple[Cell, int, bool], Path] = {}

    def reference(cell: Cell, n_steps: int, double: bool) -> Path:
        key = cell.alone, n_steps, double
        if key not in known:
            known[key] = folder / f"{len(known)}.pt"
            torch.save(vars(cases.train([*words, *cell.alone.words()], n_steps, double)), known[key])
        return known[key]

    return reference


def check(found: cases.Distance, double: bool) -> None:
    """Assert that one rank's training is as close to the reference as its precision allows."""
    curve, tensor = (1e-9, 1e-9) if double else (1e-5, 1e-4)
    distances = {
        "loss": (found.loss, curve),
        "gradient norm": (found.norm, curve),
        "validation loss": (found.validation, curve),
    }
    # In float32 not element by element: AdamW turns rounding errors of tiny gradients into whole steps.
    gradient, name = found.gradient if double else found.gradient_norm
    distances[f"gradient of {name}"] = gradient, tensor
    parameter, name = found.parameter if double else found.parameter_norm
    distances[name] = parameter, tensor
    assert {what: far for what, (far, bound) in distances.items() if not far <= bound} == {}
    assert found.other_names == [] and not found.other_tokens


@pytest.mark.parametrize(("name", "double"), RUNS)
def test_n_ranks_train_as_one_does(ranks, words, reference: Reference, name: str, double: bool) -> None:
    cell = ALL[name]
    saved, argv = reference(cell, 5, double), [*words, *cell.words()]
    for distance in ranks(cell.size).run(cases.distance_to, saved, argv, 5, double, timeout=200):
        check(distance, double)


ATTENTIONS = ("sdpa", "flex", "varlen")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_combination(ranks, words, reference: Reference, mesh: str, attention: str) -> None:
    combined = [
        replace(
            MESHES[mesh],
            attention=attention,
            accumulation=accumulation,
            recompute=recompute,
            family=family,
            overrides=over(TINY),
        )
        for accumulation, recompute, family in itertools.product(
            (1, 2), ("none", SELECTIVE, FULL), (TIED, UNTIED)
        )
    ]
    for cell in combined:
        saved, argv = reference(cell, 2, True), [*words, *cell.words()]
        for distance in ranks(cell.size).run(cases.distance_to, saved, argv, 2, True):
            check(distance, double=True)


def test_every_pair_of_settings_meets_in_a_cell() -> None:
    """Each setting also meets each axis of the mesh, and each attention each context-parallel method."""
    settings = {
        "attention": {*ATTENTIONS},
        "accumulation": {1, 2},
        "recompute": {"none", SELECTIVE, FULL},
        "family": {TIED, UNTIED},
    }
    axes = ("replicate", "shard", "context", "tensor")
    pairs, methods, wanted = set(), set(), set()
    for cell in CELLS.values():
        values = asdict(cell)
        names = [f"{axis} split" for axis in axes if values[axis] > 1]
        pairs |= {(name, value) for name in names for value in ((s, values[s]) for s in settings)}
        pairs |= {((a, values[a]), (b, values[b])) for a, b in itertools.combinations(settings, 2)}
        methods |= {(values["method"], values["attention"])} if cell.context > 1 else set()
    for a, b in itertools.combinations(settings, 2):
        wanted |= {((a, x), (b, y)) for x in settings[a] for y in settings[b]}
    wanted |= {(f"{axis} split", (s, x)) for axis in axes for s in settings for x in settings[s]}
    assert wanted - pairs == set()
    assert methods == {*itertools.product(("allgather", "ulysses"), ATTENTIONS)}


def test_every_mesh_is_in_a_cell() -> None:
    def mesh(cell: Cell) -> tuple[object, ...]:
        method = cell.method if cell.context > 1 else ""
        return cell.replicate, cell.shard, cell.context, cell.tensor, method

    assert {mesh(cell) for cell in MESHES.values()} <= {mesh(cell) for cell in CELLS.values()}


def test_samples_hold_documents_that_span_ranks_and_divide_by_nothing(words) -> None:
    trainer = cases.new_trainer(words)
    starts = [
        {int(start) for start in (row == 0).nonzero().flatten()}
        for _ in range(5)
        for row in next(trainer.state.batches).positions_BS
    ]
    assert sum(len(row) >= 3 for row in starts) > len(starts) / 2
    assert sum(len(row) <= 1 for row in starts) >= 3, "samples of one long document"
    for n_chunks in (4, 8):  # head and tail of two and of four ranks
        edges = set(range(64 // n_chunks, 64, 64 // n_chunks))
        assert sum(len(row) > 1 and not row & edges for row in starts) >= 5
