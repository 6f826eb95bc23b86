"""Generation: forwards with a cache give the logits of the whole forward, on every backend."""

import math
import warnings
from pathlib import Path
from typing import Any

import hub_cases as cases
import programs
import pytest
import torch
from ranks import RanksOf

from torchtitan_lite.attention import AttentionConfig, Flex, Sdpa, Varlen
from torchtitan_lite.inference.generate import Cache, Cached, Sampling, draw, generate
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.registry import resolve

PROMPTS = [[5, 9, 3], [7] * 17, list(range(1, 65)), [100, 200] * 16]
BACKENDS = pytest.mark.parametrize("attention", [Sdpa(), Flex(), Varlen()], ids=["sdpa", "flex", "varlen"])


def model_of(
    attention: AttentionConfig, compute_dtype: torch.dtype = torch.float32, **overrides: Any
) -> Decoder:
    """A small model whose weights are so large that its tokens differ."""
    sizes = {"n_layers": 2, "dim": 64, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96}
    model = resolve("qwen3", "debugmodel", attention, {**sizes, **overrides}).build(compute_dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", ["llama3 1B", "llama3 8B", "qwen3 0.6B", "qwen3 8B"])
def test_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = cases.small(cases.PRESETS[name])
    their = cases.theirs(config, tmp_path)
    prompts = [[token % config.vocab_size for token in prompt] for prompt in PROMPTS]
    found = generate(cases.ours(config, their), prompts, max_new_tokens=64)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0}
    wanted = their.generate(input_ids=ids, attention_mask=real, eos_token_id=None, **options)
    assert found == wanted[:, longest:].tolist()


@BACKENDS
@pytest.mark.parametrize("window", [None, 7])
def test_logits_with_the_cache_equal_those_of_the_whole_forward(
    attention: AttentionConfig, window: int | None
) -> None:
    overrides: dict[str, Any] = {} if window is None else {"sliding_window": window}
    model = model_of(attention, **overrides)
    n_rows, longest, n_new = len(PROMPTS), max(map(len, PROMPTS)), 12
    new_BS = torch.randint(1, 500, (n_rows, n_new))
    tokens_BS = torch.zeros(n_rows, longest, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        tokens_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
    is_token_BS = torch.tensor(
        [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in PROMPTS]
    )
    with Cache(model, n_rows, longest + n_new) as cache:
        found = [cache.step(tokens_BS, is_token_BS)]
        # Token by token, and two at a time.
        for part in (*new_BS[:, :6].split(1, dim=1), *new_BS[:, 6:].split(2, dim=1)):
            found.append(cache.step(part, torch.ones_like(part, dtype=torch.bool)))
    for row, prompt in enumerate(PROMPTS):
        whole = torch.tensor([*prompt, *new_BS[row].tolist()])[None]
        wanted = cases.logits_of(model, whole, torch.arange(whole.shape[1])[None])[0]
        ends = [len(prompt) - 1 + n for n in (0, 1, 2, 3, 4, 5, 6, 8, 10, 12)]
        for logits_BV, end in zip(found, ends, strict=True):
            assert (logits_BV[row] - wanted[end]).abs().max() <= 1e-5


def test_a_row_of_a_batch_gets_the_tokens_that_it_gets_alone() -> None:
    model = model_of(Sdpa())
    together = generate(model, PROMPTS, max_new_tokens=20)
    alone = [generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [Sdpa(), Flex()], ids=["sdpa", "flex"])
def test_a_gpu_gives_the_tokens_of_a_cpu(attention: AttentionConfig) -> None:
    model = model_of(attention)
    wanted = generate(model, PROMPTS, max_new_tokens=20)
    assert generate(model.cuda(), PROMPTS, max_new_tokens=20) == wanted


@pytest.mark.gpu
@BACKENDS
def test_a_gpu_gives_the_logits_of_a_cpu_in_bfloat16(attention: AttentionConfig) -> None:
    """varlen has no float32 on a GPU, and rounding to bfloat16 may change which token is likeliest."""
    longest, n_new = max(map(len, PROMPTS)), 6
    given = generate(model_of(attention), PROMPTS, max_new_tokens=n_new)
    tokens_BS, is_token_BS = torch.zeros(2, len(PROMPTS), longest, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        tokens_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
        is_token_BS[row, longest - len(prompt) :] = 1
    found = []
    for device in ("cpu", "cuda"):
        model = model_of(attention, compute_dtype=torch.bfloat16).to(device)
        with Cache(model, len(PROMPTS), longest + n_new) as cache:
            logits = [cache.step(tokens_BS, is_token_BS.bool())]
            for tokens_B1 in torch.tensor(given).split(1, dim=1):
                logits.append(cache.step(tokens_B1, torch.ones_like(tokens_B1, dtype=torch.bool)))
        found.append(torch.stack(logits).cpu())
    assert (found[0] - found[1]).norm() / found[0].norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=5, top_p=0.9)])
def test_generation_waits_for_the_gpu_once_per_token(sampling: Sampling) -> None:
    model, n_new = model_of(Sdpa(), compute_dtype=torch.bfloat16).cuda(), 5
    generate(model, PROMPTS[:1], max_new_tokens=2, sampling=sampling)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate(model, PROMPTS[:1], max_new_tokens=n_new, sampling=sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in seen if "called a synchronizing" in str(one.message)]
    assert len(waits) == n_new and len(set(waits)) == 1, waits


def test_tokens_are_drawn_where_the_logits_are() -> None:
    """Logits stay on the GPU: of their 152 thousand numbers per row, the host reads one token."""
    logits_BV = torch.empty(2, 5, device="meta")
    assert draw(logits_BV, Sampling(), torch.Generator()).device.type == "meta"


def test_a_row_that_has_ended_stays_ended_and_changes_no_other() -> None:
    model = model_of(Sdpa())
    free = generate(model, PROMPTS, max_new_tokens=20)
    end = free[1][4]
    told: list[list[int | None]] = []
    several = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[end, free[0][2]])
    assert (
        several[0] == free[0][: min(free[0].index(token) for token in (end, free[0][2]) if token in free[0])]
    )
    found = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[end], on_tokens=told.append)
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    assert found == cut and len(found[1]) <= 4
    assert [[token for token in column if token is not None] for column in zip(*told, strict=True)] == found
    assert told[-1] == [None] * len(PROMPTS)


def test_a_cache_restores_the_model_also_after_an_error() -> None:
    model = model_of(Sdpa())
    inner = [block.get_submodule("attention.inner") for block in model.blocks]
    with pytest.raises(KeyError), Cache(model, 1, 4):
        raise KeyError
    assert [block.get_submodule("attention.inner") for block in model.blocks] == inner


def test_generation_holds_no_second_copy_of_the_cache() -> None:
    # In a new process: here memory that an earlier test has freed would be used again and not be counted.
    code = "import hub_cases; print(*hub_cases.bytes_of_a_cache())"
    end = programs.run(
        ["-c", code], env=programs.environment(PYTHONPATH=f"{programs.ROOT}:{Path(cases.__file__).parent}")
    )
    assert end.returncode == 0, end.stderr
    size, held, most = map(int, end.stdout.split())
    assert size * 0.95 < held < size * 1.15
    assert most < size * 0.1


def test_the_cache_has_no_more_bytes_than_necessary() -> None:
    model = model_of(Sdpa())
    config, n_tokens, kept = model.config, 64 + 20, []
    with Cache(model, len(PROMPTS), n_tokens) as cache:
        for n in (64, 1, 1):
            tokens = torch.ones(len(PROMPTS), n, dtype=torch.int64)
            cache.step(tokens, tokens > 0)
        for module in model.modules():
            if isinstance(module, Cached):
                kept += [module.keys, module.values]
    n_bytes = sum(x.untyped_storage().nbytes() for x in kept)
    n_positions = len(PROMPTS) * n_tokens
    assert n_bytes == 2 * config.n_layers * n_positions * config.n_kv_heads * config.head_dim * 4


def counts(sampling: Sampling, logits: list[float], n: int = 20_000) -> list[float]:
    drawn = draw(torch.tensor(logits).expand(n, -1), sampling, torch.Generator().manual_seed(0))
    return [(drawn == token).float().mean().item() for token in range(len(logits))]


def test_tokens_are_drawn_as_often_as_the_logits_say() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert counts(Sampling(temperature=1.0), logits) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    squared = [p**2 / 0.365 for p in (0.5, 0.3, 0.15, 0.05)]
    assert counts(Sampling(temperature=0.5), logits) == pytest.approx(squared, abs=0.015)
    assert counts(Sampling(temperature=1.0, top_k=2), logits) == pytest.approx(
        [0.625, 0.375, 0, 0], abs=0.015
    )
    assert counts(Sampling(temperature=1.0, top_p=0.7), logits) == pytest.approx(
        [0.625, 0.375, 0, 0], abs=0.015
    )
    assert counts(Sampling(temperature=1.0, top_p=0.4), logits) == [1, 0, 0, 0]
    assert counts(Sampling(), logits) == [1, 0, 0, 0]


def test_a_tiny_top_p_draws_the_likeliest_token() -> None:
    assert counts(Sampling(temperature=1.0, top_p=1e-300), [1.0, 2.0, 0.0], n=100) == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-3, 1e30])
def test_any_temperature_draws_a_token(temperature: float) -> None:
    assert sum(counts(Sampling(temperature=temperature), [5.0, 4.0, -30.0], n=1000)) == pytest.approx(1)


def test_a_seed_repeats_a_text() -> None:
    model = model_of(Sdpa())
    options: dict[str, Any] = {"max_new_tokens": 30}
    first, again, other = (
        generate(model, PROMPTS, sampling=Sampling(temperature=1.0, seed=seed), **options)
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("tied", "attention"), [(True, "sdpa"), (True, "varlen"), (True, "flex"), (False, "sdpa")]
)
def test_ranks_that_share_a_model_give_the_tokens_of_one_rank(
    ranks: RanksOf, attention: str, tied: bool
) -> None:
    (alone,) = ranks(1).run(cases.tokens_of_ranks, attention, tied, PROMPTS)
    for tokens in ranks(2).run(cases.tokens_of_ranks, attention, tied, PROMPTS):
        assert tokens == alone
