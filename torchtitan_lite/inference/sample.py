"""A short text that a trained model writes, to show what it has learnt."""

import torch

from torchtitan_lite.attention import Sdpa
from torchtitan_lite.inference.generate import Sampling, generate
from torchtitan_lite.inference.trained import build, find_trained, lay_out_for_text
from torchtitan_lite.launch.world import World

TEMPERATURE = 0.8
"""Low enough for sound text, and high enough that a small model does not repeat itself."""


def write_sample(path: str, n_tokens: int, device: torch.device) -> str:
    """Return a new document of at most `n_tokens` tokens, by the step in the folder `path`.

    The command `generate` writes the same text for an empty prompt and the same temperature. Raises
    ConfigError if the step cannot be used.
    """
    trained = find_trained(path, World())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(trained, attention=Sdpa(), device=device, dtype=dtype, world=World())
    if device.type == "cpu":
        lay_out_for_text(model, n_rows=1)
    tokenizer = trained.tokenizer
    (tokens,) = generate(
        model,
        [[tokenizer.eos_id]],
        max_new_tokens=n_tokens,
        stop_ids=tokenizer.stop_ids,
        sampling=Sampling(temperature=TEMPERATURE),
    )
    return tokenizer.decode(tokens)
