"""Compares the tokens per second of our `generate` and of transformers, greedy, on the same random weights.

    benchmarks/generate.py --name qwen3 --flavor debugmodel --prompts 4 --new 128 --rounds 7

The two run in turns, in alternating order, on a CPU, and must give the same tokens. Prompts have 8 to 64
tokens; no token ends a text early. Needs the "hf" extra. Prints a line of JSON.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from torchtitan_lite.inference.generate import generate
from torchtitan_lite.inference.trained import lay_out_for_text
from torchtitan_lite.models.decoder import Decoder, DecoderConfig
from torchtitan_lite.models.huggingface import config_json
from torchtitan_lite.models.registry import resolve


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--name", default="qwen3")
    parser.add_argument("--flavor", default="debugmodel")
    parser.add_argument("--overrides", type=json.loads, default={}, help="fields of the decoder, as JSON")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = resolve(args.name, args.flavor, overrides=args.overrides)
    ours, theirs = models(config)
    lay_out_for_text(ours, args.prompts)
    lengths = torch.linspace(8, 64, args.prompts).int().tolist()
    prompts = [torch.randint(1, config.vocab_size, (length,)).tolist() for length in lengths]
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: generate(ours, prompts, max_new_tokens=args.new),
        "transformers": lambda: generate_theirs(theirs, prompts, args.new),
    }
    assert ways["ours"]() == ways["transformers"](), "the two generate different tokens"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in list(ways) if number % 2 else reversed(ways):
            began = perf_counter()
            ways[way]()
            seconds[way].append(perf_counter() - began)
    n_tokens = args.prompts * args.new
    report = {
        "model": f"{args.name} {args.flavor}",
        "parameters": config.n_params,
        "prompts": args.prompts,
        "tokens_per_second": {way: round(n_tokens / statistics.median(of)) for way, of in seconds.items()},
        "times_as_fast": round(
            statistics.median(b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)), 3
        ),
    }
    print(json.dumps(report))


def models(config: DecoderConfig) -> tuple[Decoder, Any]:
    """Our model and transformers', with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(config, dtype="float32", eos_id=0)))
        theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    torch.manual_seed(0)
    ours = config.build().requires_grad_(False)
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            # Weights large enough that attention is not uniform and the tokens differ.
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.1)
            weights[config.parameters.hub_name(name)].copy_(weight)
    return ours, theirs


@torch.no_grad()
def generate_theirs(model: Any, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    """The new tokens of transformers, which wants prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": n_new, "min_new_tokens": n_new, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=real, eos_token_id=None, **options)
    return found[:, longest:].tolist()


if __name__ == "__main__":
    main()
