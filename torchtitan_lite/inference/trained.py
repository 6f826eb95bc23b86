"""Load a trained model from the folder of a run or a step, on one device or split over ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig
from torchtitan_lite.checkpoint.restore import VerifiedStep, find_initial, load, refusing_bad_step
from torchtitan_lite.checkpoint.state import flat
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.validation import validate
from torchtitan_lite.data import Tokenizer, load_tokenizer
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import Decoder, DecoderConfig
from torchtitan_lite.parallel.tensor import apply_tensor_parallel_to_predict
from torchtitan_lite.training.hub import TOKENIZER, check_vocabulary, decoder_of
from torchtitan_lite.training.record import pieces

KEY = "RUN_OR_STEP"
_SMALL = 2**19
"""The most elements of a weight that counts as small."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A verified step, its model's config, and its tokenizer."""

    found: VerifiedStep
    config: DecoderConfig
    tokenizer: Tokenizer


def find_trained(path: str, world: World, tokenizer: str = "") -> Trained:
    """Return the trained model of the step in `path`, or of the newest step if `path` is a run's folder.

    All bytes of the step are verified. `tokenizer` names the tokenizer if it has moved since the run. Raises
    ConfigError if the step is missing or damaged, or if the tokenizer is not found or does not fit.
    """
    found = find_initial(path, world, KEY)
    with refusing_bad_step(KEY, path):
        config = decoder_of(found.state.identity)
    own = _tokenizer(found, tokenizer)
    check_vocabulary(own, config, "tokenizer", tokenizer)
    return Trained(found=found, config=config, tokenizer=own)


@contextmanager
def renaming_keys(keys: Mapping[str, str]) -> Iterator[None]:
    """A context manager: a ConfigError inside is raised again, with its keys replaced as `keys` says."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([replace(x, key=keys.get(x.key, x.key)) for x in error.problems]) from None


def _tokenizer(found: VerifiedStep, given: str) -> Tokenizer:
    """Return the tokenizer whose fingerprint the step has.

    The tokenizer is read from `given`. If `given` is empty, it is searched beside the step and at the place
    where the run found it.
    """
    wanted = found.state.identity.get("data.tokenizer_fingerprint")
    saved = found.state.config.get("tokenizers")
    options, _ = validate(registry.tokenizers.section, [saved] if isinstance(saved, dict) else [])
    if given:
        with renaming_keys({"data.tokenizer": "tokenizer"}):
            own = load_tokenizer(given, options)
        if wanted in (None, own.fingerprint):
            return own
        rule, remedy = f"is not the one that {found.folder} was trained with", "name that one"
        raise ConfigError([Problem("tokenizer", given, rule, remedy)])
    settings, steps = flat(found.state.config), found.folder.parent
    beside = (str(folder / TOKENIZER) for folder in (steps.parent, steps))
    for place in ("bytes", *beside, settings.get("data.tokenizer")):
        with suppress(ConfigError):
            if place and (own := load_tokenizer(place, options)).fingerprint == wanted:
                return own
    rule = f"is not beside {found.folder}, nor where its run found it"
    remedy = "name its file or folder with --tokenizer"
    plugins = settings.get("job.plugins")
    if plugins and isinstance(plugins, list):  # a hint only, because the user alone decides what is imported
        remedy += f", or its module with --plugins {' '.join(map(str, plugins))}"
    raise ConfigError([Problem("tokenizer", given, rule, remedy)])


def build(
    trained: Trained,
    *,
    attention: AttentionConfig,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> Decoder:
    """Return the model for inference, with weights in `dtype`, split over all ranks by tensor parallel.

    Raises ConfigError if the number of ranks does not divide the model's sizes.
    """
    sizes = trained.config.splits
    if wrong := [name for name in sizes if sizes[name] % world.size]:
        rule = f"does not divide the model's {wrong[0]} = {sizes[wrong[0]]}"
        remedy = "start a number of ranks that divides it"
        raise ConfigError([Problem("WORLD_SIZE", world.size, rule, remedy)])
    stored = {x.dtype for name, x in trained.found.index.items() if name.startswith("model.")}
    with torch.device("meta"):
        model = replace(trained.config, attention=attention).build(compute_dtype=dtype)
    if len(stored) == 1:
        model.to(stored.pop())  # the last step of a run may store only the model, in another precision
    if world.size > 1:
        mesh = init_device_mesh(device.type, (world.size,))
        apply_tensor_parallel_to_predict(model, mesh)
    model.to_empty(device=device).requires_grad_(False).eval()
    load(trained.found, pieces(dict(model.named_parameters())), world, KEY)
    return model.to(dtype)


def lay_out_for_text(model: nn.Module, n_rows: int) -> None:
    """Store weights transposed in memory where a CPU then multiplies `n_rows` tokens faster.

    It is faster for one row, and with several rows for small weights: see benchmarks/generate.py.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and (n_rows == 1 or module.weight.numel() <= _SMALL):
            module.weight.data = module.weight.data.t().contiguous().t()
