"""A trained model, from the folder of a run or of a step, verified, on one device or split over ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig
from torchtitan_lite.checkpoint.manifest import Damaged, Unreadable
from torchtitan_lite.checkpoint.restore import Found, find_initial, load
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


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A verified step, what it is a step of, and the tokenizer that belongs to it."""

    found: Found
    config: DecoderConfig
    tokenizer: Tokenizer


def find(path: str, ranks: World, tokenizer: str = "") -> Trained:
    """The step in `path`, or the newest in the folder of a run; all of its bytes are verified.

    `tokenizer` is where that is now, if it is no longer where the run found it. Raises ConfigError.
    """
    found = find_initial(path, ranks, KEY)
    with told_of_step(path):
        config = decoder_of(found.state.identity)
    own = _tokenizer(found, tokenizer)
    check_vocabulary(own, config, "tokenizer", tokenizer)
    return Trained(found=found, config=config, tokenizer=own)


@contextmanager
def told_as(keys: Mapping[str, str]) -> Iterator[None]:
    """Within it, what is wrong with `keys` of a run is told by the names that they have here."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([replace(x, key=keys.get(x.key, x.key)) for x in error.problems]) from None


@contextmanager
def told_of_step(path: str) -> Iterator[None]:
    """Within it, what is wrong with the step at `path` is a ConfigError."""
    try:
        yield
    except (Damaged, Unreadable) as problem:
        rule, remedy = f"holds no good step: {problem}", "name a step-N folder that a run has published"
        raise ConfigError([Problem(KEY, path, rule, remedy)]) from None


def _tokenizer(found: Found, given: str) -> Tokenizer:
    """The one whose fingerprint the step has: as given, beside the step, or where the run found it."""
    wanted = found.state.identity.get("data.tokenizer_fingerprint")
    saved = found.state.config.get("tokenizers")
    options, _ = validate(registry.tokenizers.section, [saved] if isinstance(saved, dict) else [])
    if given:
        with told_as({"data.tokenizer": "tokenizer"}):
            own = load_tokenizer(given, options)
        if wanted in (None, own.fingerprint):
            return own
        rule, remedy = f"is not the one that {found.folder} was trained with", "name that one"
        raise ConfigError([Problem("tokenizer", given, rule, remedy)])
    for place in _places(found):
        with suppress(ConfigError):
            own = load_tokenizer(place, options)
            if own.fingerprint == wanted:
                return own
    rule = f"is not beside {found.folder}, nor where its run found it"
    remedy = "name its file or folder with --tokenizer"
    if _plugins(found):
        remedy += f", or its module with --plugins {' '.join(_plugins(found))}"
    raise ConfigError([Problem("tokenizer", given, rule, remedy)])


def _plugins(found: Found) -> list[str]:
    """The modules that the run says it had imported; only the user imports them here."""
    job = found.state.config.get("job")
    names = job.get("plugins") if isinstance(job, dict) else None
    return list(map(str, names)) if isinstance(names, list) else []


def _places(found: Found) -> Iterator[str]:
    yield "bytes"
    yield str(found.folder.parent.parent / TOKENIZER)
    yield str(found.folder.parent / TOKENIZER)
    if path := found.state.config.get("data", {}).get("tokenizer"):
        yield path


def build(
    trained: Trained,
    *,
    attention: AttentionConfig,
    device: torch.device,
    dtype: torch.dtype,
    ranks: World,
    tensor: DeviceMesh | None = None,
) -> Decoder:
    """The model, to give logits: with weights in `dtype`, and split over `tensor` if there is such a mesh."""
    stored = {x.dtype for name, x in trained.found.index.items() if name.startswith("model.")}
    with torch.device("meta"):
        model = replace(trained.config, attention=attention).build(compute_dtype=dtype)
    if len(stored) == 1:
        model.to(stored.pop())  # a last step may hold the model alone, in another precision
    if tensor is not None:
        apply_tensor_parallel_to_predict(model, tensor, model.config.shard_dims)
    model.to_empty(device=device).requires_grad_(False).eval()
    load(trained.found, pieces(dict(model.named_parameters())), ranks, KEY)
    return model.to(dtype)


def lay_out_for_text(model: nn.Module, n_rows: int) -> None:
    """Have weights in memory as their transpose where a CPU multiplies `n_rows` tokens with that faster.

    Measured by benchmarks/generate.py: always for one row; for several, where a weight is small.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and (n_rows == 1 or module.weight.numel() <= _SMALL):
            module.weight.data = module.weight.data.t().contiguous().t()
