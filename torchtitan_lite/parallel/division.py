"""Check that the degrees of the mesh divide heads, widths, the vocabulary and the sequence."""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, gcd, lcm
from typing import Any

from torchtitan_lite.config.problem import Problem, either

_MOST_TRIED = 1024
"""The largest degree that a remedy proposes."""
_SPLIT_SEQUENCES = (
    "parallelism.tensor_parallel_degree",
    "parallelism.context_parallel_degree",
    "parallelism.context_parallel_method",
    "parallelism.context_parallel_load_balancer",
)
"""The keys that decide into how many parts a sequence is split."""


class Division:
    """The degrees in the section `[parallelism]`, and the sizes of a run that the degrees must divide.

    `decoder` is a `DecoderConfig`, or None if the model is not known.
    """

    def __init__(self, parallelism: Any, decoder: Any, *, seq_len: int, world_size: int) -> None:
        self.parallelism, self.decoder = parallelism, decoder
        self.seq_len, self.world_size = seq_len, world_size
        tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
        self.sizes: dict[str, int] = decoder.splits if decoder else {}
        self.undivided = [name for name, size in self.sizes.items() if size % tensor]
        # A tensor parallel degree that is wrong counts as 1, so that the other checks are independent.
        self.tensor = 1 if self.undivided else tensor
        self.heads = self.sizes.get(decoder.dealt_by_ulysses, 0) // self.tensor if decoder else 0
        is_ulysses = parallelism.context_parallel_method == "ulysses"
        self.heads_left = self.heads % context if is_ulysses else 0
        is_balanced = context > 1 and parallelism.context_parallel_load_balancer == "headtail"
        self.n_chunks = 2 if is_balanced and not is_ulysses else 1
        # The sequence must be a multiple of this number of tokens.
        self.unit = context * lcm(self.n_chunks, self.tensor)

    def problems(self) -> list[Problem]:
        """Return a problem for each degree that does not divide the model's sizes or the sequence."""
        found = []
        reads = tuple(f"model.overrides.{name}" for name in self.sizes)
        if self.undivided:
            degree, extensible = self.parallelism.tensor_parallel_degree, self.decoder.extensible
            rule = (
                f"does not divide {either(f'model.{name} = {self.sizes[name]}' for name in self.undivided)}"
            )
            remedy = self._better_degrees("tensor_parallel_degree", gcd(*self.sizes.values()))
            enough = ceil(self.sizes.get(extensible, 0) / degree) * degree
            if self.undivided == [extensible] and self._suits({}, {extensible: enough}):
                remedy += f", or model.overrides.{extensible} = {enough}"
            found.append(Problem("parallelism.tensor_parallel_degree", degree, rule, remedy, reads))
        if self.heads_left:
            degree, dealt = self.parallelism.context_parallel_degree, self.decoder.dealt_by_ulysses
            rule = f"does not divide model.{dealt} = {self.sizes[dealt]}"
            if self.tensor > 1:
                rule += f" / parallelism.tensor_parallel_degree = {self.tensor}"
            remedy = self._better_degrees("context_parallel_degree", self.heads)
            if self._suits({"context_parallel_method": "allgather"}):
                remedy += ', or parallelism.context_parallel_method = "allgather"'
            found.append(Problem("parallelism.context_parallel_degree", degree, rule, remedy, reads))
        if self.seq_len % self.unit:
            reads = (*_SPLIT_SEQUENCES, *reads)
            found.append(Problem("training.seq_len", self.seq_len, *self._sequence_rule(), reads))
        return found

    def _sequence_rule(self) -> tuple[str, str]:
        """Return the rule that the length of the sequence breaks, and the remedy."""
        degree, degrees = self.parallelism.context_parallel_degree, []
        if degree > 1:
            balanced = " (headtail)" if self.n_chunks > 1 else ""
            degrees.append(f"parallelism.context_parallel_degree = {degree}{balanced}")
        if self.tensor > 1:
            degrees.append(f"parallelism.tensor_parallel_degree = {self.tensor}")
        ask = "asks" if len(degrees) == 1 else "ask"
        most = self.decoder.max_seq_len if self.decoder else self.seq_len + self.unit
        below = min(self.seq_len, most) // self.unit * self.unit
        better = [length for length in (below, below + self.unit) if 0 < length <= most]
        remedy = f"use {either(better)}" if better else "use smaller degrees"
        if self._suits({"context_parallel_load_balancer": "none"}):
            remedy += ', or parallelism.context_parallel_load_balancer = "none"'
        return f"is not a multiple of {self.unit}, as {' and '.join(degrees)} {ask}", remedy

    def _better_degrees(self, name: str, whole: int) -> str:
        """Return the remedy: values of the degree `name` that divide `whole` and suit all else, or 1.

        The other checks count a wrong degree as 1, so 1 suits whatever they propose. The ranks that this
        leaves over can only shard the data.
        """
        divisors = [n for n in range(1, min(whole, _MOST_TRIED) + 1) if whole % n == 0]
        if good := [n for n in divisors if self._suits({name: n})]:
            return f"use {either(good)}"
        is_free = self.parallelism.data_parallel_shard_degree == -1
        return "use 1" if is_free else "use 1, and set parallelism.data_parallel_shard_degree = -1"

    def _suits(self, degrees: Mapping[str, object], sizes: Mapping[str, int] | None = None) -> bool:
        """Return True if all divides and suits the ranks with these `degrees` and `sizes` of the decoder."""
        mesh: Any = replace(self.parallelism, **degrees)
        if mesh.problems("parallelism", self.world_size):
            return False
        decoder = replace(self.decoder, **sizes) if sizes else self.decoder
        other = Division(mesh, decoder, seq_len=self.seq_len, world_size=self.world_size)
        return not (other.undivided or other.heads_left or other.seq_len % other.unit)
