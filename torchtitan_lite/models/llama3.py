"""Llama 3: the text sizes of Llama 3.1 (8B, 70B, 405B) and 3.2 (1B, 3B), one row each."""

from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.rope import RopeScaling


def _llama3(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    ffn_dim: int,
    tie_embeddings: bool,
    scaling_factor: float,
    *,
    vocab_size: int = 128_256,
    max_seq_len: int = 131_072,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        max_seq_len=max_seq_len,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=scaling_factor),
        qk_norm=False,
        tie_embeddings=tie_embeddings,
    )


# Published sizes: https://huggingface.co/meta-llama/Llama-3.2-<size>/blob/main/config.json for 1B and 3B,
# https://huggingface.co/meta-llama/Llama-3.1-<size>/blob/main/config.json for the others.
PRESETS = {
    "debugmodel": _llama3(256, 6, 8, 4, 32, 768, False, 8.0, vocab_size=512, max_seq_len=2048),
    "1B": _llama3(2048, 16, 32, 8, 64, 8192, True, 32.0),
    "3B": _llama3(3072, 28, 24, 8, 128, 8192, True, 32.0),
    "8B": _llama3(4096, 32, 32, 8, 128, 14336, False, 8.0),
    "70B": _llama3(8192, 80, 64, 8, 128, 28672, False, 8.0),
    "405B": _llama3(16384, 126, 128, 8, 128, 53248, False, 8.0),
}
"""Sizes by name; debugmodel is small enough for a laptop."""
