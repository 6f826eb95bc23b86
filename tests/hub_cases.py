"""Models of transformers and of ours with the same random weights, for tests of import and export."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import resume_cases
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from torchtitan_lite.attention import Sdpa
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.inference.generate import Cache, generate
from torchtitan_lite.models.decoder import Decoder, DecoderConfig
from torchtitan_lite.models.huggingface import config_json
from torchtitan_lite.models.registry import families, resolve
from torchtitan_lite.parallel.fsdp import own_shard
from torchtitan_lite.parallel.tensor import apply_tensor_parallel_to_predict

ORIGINAL = 64
"""Original context length, in tokens, for the rotary scaling of the small models."""
PRESETS = {f"{name} {size}": config for name, sizes in families.items() for size, config in sizes.items()}


def small(config: DecoderConfig) -> DecoderConfig:
    """A small model with the ratios of a preset: heads to kv heads, head_dim to dim, ffn_dim to dim."""
    n_kv_heads, head_dim = 2, 16
    n_heads = n_kv_heads * config.n_heads // config.n_kv_heads
    dim = n_heads * head_dim * config.dim // (config.n_heads * config.head_dim)
    scaling = config.rope_scaling and replace(config.rope_scaling, original_max_seq_len=ORIGINAL)
    return replace(
        config,
        vocab_size=211,
        dim=dim,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=dim * config.ffn_dim // config.dim,
        max_seq_len=4096,
        rope_scaling=scaling,
        attention=Sdpa(),
    )


def theirs(config: DecoderConfig, folder: Path) -> Any:
    """A model of transformers with random weights, built from the config.json that we write."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config_json(config, dtype="float32", eos_id=0)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Norms too, which would be ones. Weights are so large that attention prefers some keys.
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.07)
    return model


def ours(config: DecoderConfig, model: Any) -> Decoder:
    """Our model with the weights of a model of transformers."""
    weights, own = model.state_dict(), config.build()
    with torch.no_grad():
        for name, weight in own.named_parameters():
            weight.copy_(weights[config.parameters.hub_name(name)])
    return own


def logits_of(model: Decoder, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
    """The logits after every token. The model itself never makes all of them at once."""
    normed: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda *words: normed.append(words[-1]))
    mask = model.config.attention.mask(positions_BS, sliding_window=model.config.sliding_window)
    with torch.no_grad():
        model(tokens_BS, positions_BS, mask, tokens_BS)
    hook.remove()
    return F.linear(normed[0], model.head_weight_VD)


def tokens_of_ranks(attention: str, tied: bool, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that a model generates which all ranks share."""
    sizes = {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96}
    config = resolve(
        "qwen3", f"debugmodel_{attention}".removesuffix("_sdpa"), None, {**sizes, "tie_embeddings": tied}
    )
    model = config.build()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    if dist.get_world_size() > 1:
        with torch.device("meta"):
            model = config.build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        apply_tensor_parallel_to_predict(model, mesh)
        model.to_empty(device="cpu")
        for name, weight in model.named_parameters():
            share, box = own_shard(weight)
            share.copy_(weights[name][tuple(slice(start, start + n) for start, n in box)])
    return generate(model, prompts, max_new_tokens=20)


def refusal_of(argv: list[str]) -> str:
    """The error of a start that is refused, on this rank."""
    try:
        resume_cases.start(argv)
    except ConfigError as refused:
        return str(refused)
    return ""


def held() -> int:
    """Bytes of memory of this process, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def held_during(act: Callable[[], object]) -> int:
    """The largest growth of this process's memory during `act`, in bytes."""
    found, over = [before := held()], Event()

    def look() -> None:
        while not over.wait(0.0005):
            found.append(held())

    watcher = Thread(target=look)
    watcher.start()
    try:
        act()
    finally:
        over.set()
        watcher.join()
    return max(found) - before


def bytes_of_a_cache() -> tuple[int, int, int]:
    """Bytes that a cache needs, bytes that it takes, and the peak growth for one more token."""
    torch.set_num_threads(1)
    sizes = {"n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "head_dim": 64, "dim": 16, "ffn_dim": 16}
    config, n_rows, n_tokens = resolve("qwen3", "debugmodel", None, sizes), 8, 2048
    part = torch.ones(n_rows, 64, dtype=torch.int64)  # few at a time, so that little else is in memory
    with Cache(config.build(), n_rows, n_tokens) as cache:
        cache.step(part, part > 0)
        before = held()
        for _ in range(n_tokens // 64 - 2):
            cache.step(part, part > 0)
        after = held()
        most = held_during(lambda: cache.step(part[:, :1], part[:, :1] > 0))
    n_new = n_tokens - 2 * 64
    return (
        2 * config.n_layers * n_rows * n_new * config.n_kv_heads * config.head_dim * 4,
        after - before,
        most,
    )


def positions_of(*lengths: int) -> Tensor:
    """The positions of one row of documents with these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])[None]
