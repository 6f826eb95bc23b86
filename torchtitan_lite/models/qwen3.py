"""Qwen3: the dense models, one row for each size."""

from torchtitan_lite.models.presets import presets

_FAMILY = {
    "vocab_size": 151_936,
    "max_seq_len": 40_960,
    "norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "qk_norm": True,
}

# Published sizes: https://huggingface.co/Qwen/Qwen3-<size>/blob/main/config.json
_COLUMNS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "tie_embeddings")
_SIZES = {
    "debugmodel": (256, 6, 8, 4, 32, 768, True),
    "0.6B": (1024, 28, 16, 8, 128, 3072, True),
    "1.7B": (2048, 28, 16, 8, 128, 6144, True),
    "4B": (2560, 36, 32, 8, 128, 9728, True),
    "8B": (4096, 36, 32, 8, 128, 12288, False),
    "14B": (5120, 40, 40, 8, 128, 17408, False),
    "32B": (5120, 64, 64, 8, 128, 25600, False),
}

PRESETS = presets(_FAMILY, _COLUMNS, _SIZES)
"""The configs by size. debugmodel is small enough for a laptop."""
