"""Generate text: one forward for all prompts, then one per token, with cached keys and values.

B batch, S tokens of a forward, T tokens so far (with padding), H query heads, G key/value heads, K head dim,
V vocab.

Shorter prompts are padded on the left, so that all rows end together. Padding has position -1, and no token
attends to it. The mask of a forward has S queries and T keys, aligned at their ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from torchtitan_lite.attention.mask import Ranges
from torchtitan_lite.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rules for drawing a token from the logits."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """The number that divides the logits. 0: always the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many of the likeliest tokens. 0: from all tokens."""
    top_p: Annotated[float, Field(gt=0, le=1, examples=[1.0])] = 1.0
    """Draw from the fewest likeliest tokens that together have at least this probability."""
    seed: Annotated[int, Field(ge=0)] = 0


class Cached(nn.Module):
    """A wrapper of an attention module that keeps keys and values for later forwards."""

    def __init__(self, attend: nn.Module, n_tokens: int) -> None:
        super().__init__()
        self.attend, self.n_tokens, self.n_kept = attend, n_tokens, 0
        self.keys = self.values = torch.empty(0)

    def forward(
        self, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: object, scale: float | None = None
    ) -> Tensor:
        if self.n_kept == 0:
            B, _, G, K = k_BSGK.shape
            self.keys, self.values = (k_BSGK.new_empty(B, self.n_tokens, G, K) for _ in range(2))
        end = self.n_kept + k_BSGK.shape[1]
        self.keys[:, self.n_kept : end] = k_BSGK
        self.values[:, self.n_kept : end] = v_BSGK
        self.n_kept = end
        return self.attend(q_BSHK, self.keys[:, :end], self.values[:, :end], mask, scale)


@dataclass(frozen=True)
class Newest:
    """The tokens of one forward: the last `n_tokens` of a sequence. Earlier keys and values are cached."""

    n_tokens: int

    def queries(self, seq_len: int) -> Ranges:
        """Return the range of the last `n_tokens` tokens in a sequence of `seq_len` tokens."""
        return ((seq_len - self.n_tokens, seq_len),)

    def shard(self, x_BS: Tensor) -> Tensor:
        """Return the last `n_tokens` columns of `x_BS`."""
        return x_BS[:, -self.n_tokens :]


class Cache:
    """A batch of sequences that grow together.

    A context manager: inside, the attention of `model` keeps keys and values. On exit the model is restored.
    """

    def __init__(self, model: Decoder, n_rows: int, n_tokens: int) -> None:
        self.model, self.n_tokens, self.n_so_far = model, n_tokens, 0
        self.device = model.device
        self.positions_BT = torch.full((n_rows, n_tokens), -1)
        self.next_B = torch.zeros(n_rows, dtype=torch.int64)

    def __enter__(self) -> Self:
        self.model.wrap_attention(lambda attend: Cached(attend, self.n_tokens))
        return self

    def __exit__(self, *_: object) -> None:
        self.model.wrap_attention(lambda cached: cached.get_submodule("attend"))

    @torch.inference_mode()
    def step(self, tokens_BS: Tensor, is_token_BS: Tensor) -> Tensor:
        """Append tokens to every row, and return new logits [B, V]. `is_token_BS` is False for padding."""
        start, end = self.n_so_far, self.n_so_far + tokens_BS.shape[1]
        counted = is_token_BS.long()
        positions_BS = torch.where(is_token_BS, self.next_B[:, None] + counted.cumsum(1) - 1, -1)
        self.next_B += counted.sum(1)
        self.positions_BT[:, start:end] = positions_BS
        self.n_so_far = end
        share = Newest(tokens_BS.shape[1])
        return self.model(
            *self.model.prepare(tokens_BS, self.positions_BT[:, :end], share=share, device=self.device)
        )


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    on_tokens: Callable[[list[int | None]], Any] = lambda tokens: None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt: at most `max_new_tokens`, before the first of `stop_ids`.

    `on_tokens` is called with the next token of every row as soon as the tokens are drawn. A token is None if
    the row's text has ended. In the last call all tokens are None.
    """
    longest = max(map(len, prompts))
    tokens_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    is_token_BS = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, longest - len(prompt) :] = torch.tensor(prompt)
        is_token_BS[row, longest - len(prompt) :] = True
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    found: list[list[int]] = [[] for _ in prompts]
    goes_on_B = torch.ones(len(prompts), dtype=torch.bool)
    ends = torch.tensor(stop_ids, dtype=torch.int64)
    with Cache(model, len(prompts), longest + max_new_tokens) as cache:
        for _ in range(max_new_tokens):
            drawn_B = draw(cache.step(tokens_BS, is_token_BS), sampling, generator)
            next_B = drawn_B.cpu()  # the only wait for the device
            goes_on_B = goes_on_B & ~torch.isin(next_B, ends)
            if not goes_on_B.any():
                break
            tokens = [
                int(token) if goes_on else None for token, goes_on in zip(next_B, goes_on_B, strict=True)
            ]
            for row, token in enumerate(tokens):
                found[row] += [] if token is None else [token]
            on_tokens(tokens)
            tokens_BS, is_token_BS = drawn_B[:, None], goes_on_B[:, None]
    on_tokens([None] * len(prompts))
    return found


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw a token for each row, on the device of the logits and of `generator`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=1)
    # Subtract the largest logit first: dividing by a tiny temperature then gives 0 or -inf, never inf or NaN.
    logits_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k:
        least_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]), dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True)
        before_BV = sorted_BV.softmax(dim=1).cumsum(dim=1) - sorted_BV.softmax(dim=1)
        drop_BV = before_BV >= sampling.top_p
        drop_BV[:, 0] = False  # always keep the likeliest token
        drop_BV = torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV)
        logits_BV = logits_BV.masked_fill(drop_BV, -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=1), 1, generator=generator)[:, 0]
