"""Qwen3: the dense sizes, one row each."""

from torchtitan_lite.models.decoder import DecoderConfig


def _qwen3(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    ffn_dim: int,
    tie_embeddings: bool,
    *,
    vocab_size: int = 151_936,
    head_dim: int = 128,
    max_seq_len: int = 40_960,
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
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        rope_scaling=None,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
    )


# Published sizes: https://huggingface.co/Qwen/Qwen3-<size>/blob/main/config.json
PRESETS = {
    "debugmodel": _qwen3(256, 6, 8, 4, 768, True, vocab_size=512, head_dim=32, max_seq_len=2048),
    "0.6B": _qwen3(1024, 28, 16, 8, 3072, True),
    "1.7B": _qwen3(2048, 28, 16, 8, 6144, True),
    "4B": _qwen3(2560, 36, 32, 8, 9728, True),
    "8B": _qwen3(4096, 36, 32, 8, 12288, False),
    "14B": _qwen3(5120, 40, 40, 8, 17408, False),
    "32B": _qwen3(5120, 64, 64, 8, 25600, False),
}
"""Sizes by name; debugmodel is small enough for a laptop."""
