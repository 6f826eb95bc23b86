"""Llama 3: the text models of Llama 3.1 (8B, 70B, 405B) and Llama 3.2 (1B, 3B), one row each."""

from torchtitan_lite.models.presets import presets
from torchtitan_lite.models.rope import RopeScaling

_FAMILY = {
    "vocab_size": 128_256,
    "max_seq_len": 131_072,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "qk_norm": False,
}
_X8, _X32 = RopeScaling(factor=8.0), RopeScaling(factor=32.0)
# transformers warns unless the original length is shorter than max_seq_len, which debugmodel has smaller.
_X8_SHORT = RopeScaling(factor=8.0, original_max_seq_len=256)

# Published sizes: https://huggingface.co/meta-llama/Llama-3.2-<size>/blob/main/config.json for 1B and 3B,
# https://huggingface.co/meta-llama/Llama-3.1-<size>/blob/main/config.json for the others.
_COLUMNS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "tie_embeddings", "rope_scaling"
)  # fmt: skip
_SIZES = {
    "debugmodel": (256, 6, 8, 4, 32, 768, False, _X8_SHORT),
    "1B": (2048, 16, 32, 8, 64, 8192, True, _X32),
    "3B": (3072, 28, 24, 8, 128, 8192, True, _X32),
    "8B": (4096, 32, 32, 8, 128, 14336, False, _X8),
    "70B": (8192, 80, 64, 8, 128, 28672, False, _X8),
    "405B": (16384, 126, 128, 8, 128, 53248, False, _X8),
}

PRESETS = presets(_FAMILY, _COLUMNS, _SIZES)
"""The configs by size. debugmodel is small enough for a laptop."""
