"""Checks that the degrees of the mesh divide heads, widths, the vocabulary and the sequence."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm
from typing import Any

from torchtitan_lite.config.problem import Problem, either

_MOST_TRIED = 1024
"""The largest degree that a remedy proposes."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """A mesh, and the sizes that its degrees must divide."""

    parallelism: Any
    """The section `[parallelism]`."""
    world_size: int
    seq_len: int
    max_seq_len: int | None
    """Longest sequence of the model; None if the model is not known."""
    sizes: dict[str, int]
    """The sizes that tensor parallel must divide, by the decoder's field; empty if the model is not known."""
    dealt_by_ulysses: str
    """The field that counts the heads which Ulysses deals out."""
    extensible: str
    """The field that may be larger than the data needs."""

    def problems(self) -> list[Problem]:
        """The degrees that do not divide evenly, for any number of ranks."""
        return [
            *(self._tensor_problems() if self.undivided else ()),
            *(self._heads_problems() if self.heads_left else ()),
            *(self._sequence_problems() if self.seq_len % self.unit else ()),
        ]

    @property
    def is_even(self) -> bool:
        """True if the degrees suit the number of ranks and divide everything."""
        if self.parallelism.problems("parallelism", self.world_size):
            return False
        return not (self.undivided or self.heads_left or self.seq_len % self.unit)

    @cached_property
    def undivided(self) -> list[str]:
        """The fields whose sizes tensor parallel does not divide."""
        degree = self.parallelism.tensor_parallel_degree
        return [name for name, size in self.sizes.items() if size % degree]

    @property
    def tensor(self) -> int:
        """The degree of tensor parallel; 1 if that is refused, so that the other checks stand alone."""
        return 1 if self.undivided else self.parallelism.tensor_parallel_degree

    @property
    def heads(self) -> int:
        """The heads of a rank that Ulysses deals out; 0 if the model is not known."""
        return self.sizes.get(self.dealt_by_ulysses, 0) // self.tensor

    @property
    def heads_left(self) -> int:
        """The heads that Ulysses leaves over."""
        is_ulysses = self.parallelism.context_parallel_method == "ulysses"
        return self.heads % self.parallelism.context_parallel_degree if is_ulysses else 0

    @property
    def n_chunks(self) -> int:
        """The number of equal chunks of the sequence that each rank of context parallel has."""
        mesh = self.parallelism
        is_balanced = mesh.context_parallel_degree > 1 and mesh.context_parallel_load_balancer == "headtail"
        return 2 if is_balanced and mesh.context_parallel_method == "allgather" else 1

    @property
    def unit(self) -> int:
        """The sequence must be a multiple of this number of tokens."""
        return self.parallelism.context_parallel_degree * lcm(self.n_chunks, self.tensor)

    def _tensor_problems(self) -> list[Problem]:
        whole = either([f"model.{name} = {self.sizes[name]}" for name in self.undivided])
        remedy = self._better("tensor_parallel_degree", gcd(*self.sizes.values()))
        if self.undivided == [self.extensible]:
            degree = self.parallelism.tensor_parallel_degree
            enough = -(-self.sizes[self.extensible] // degree) * degree
            remedy += f", or model.overrides.{self.extensible} = {enough}"
        return [self._problem("tensor_parallel_degree", whole, remedy)]

    def _heads_problems(self) -> list[Problem]:
        whole = f"model.{self.dealt_by_ulysses} = {self.sizes[self.dealt_by_ulysses]}"
        if self.tensor > 1:
            whole += f" / parallelism.tensor_parallel_degree = {self.tensor}"
        remedy = self._better("context_parallel_degree", self.heads)
        if self._with(context_parallel_method="allgather").is_even:
            remedy += ', or parallelism.context_parallel_method = "allgather"'
        return [self._problem("context_parallel_degree", whole, remedy)]

    def _sequence_problems(self) -> list[Problem]:
        mesh, needs = self.parallelism, []
        if mesh.context_parallel_degree > 1:
            balanced = " (headtail)" if self.n_chunks > 1 else ""
            needs.append(f"parallelism.context_parallel_degree = {mesh.context_parallel_degree}{balanced}")
        if self.tensor > 1:
            needs.append(f"parallelism.tensor_parallel_degree = {self.tensor}")
        rule = f"is not a multiple of {self.unit}, as {' and '.join(needs)} ask{'s' * (len(needs) == 1)}"
        most = self.max_seq_len or self.seq_len + self.unit
        below = min(self.seq_len, most) // self.unit * self.unit
        better = [size for size in (below, below + self.unit) if 0 < size <= most]
        remedy = f"use {either(better)}" if better else "use smaller degrees"
        if self._with(context_parallel_load_balancer="none").is_even:
            remedy += ', or parallelism.context_parallel_load_balancer = "none"'
        return [Problem("training.seq_len", self.seq_len, rule, remedy, ("parallelism", *self._reads))]

    def _problem(self, name: str, whole: str, remedy: str) -> Problem:
        value = getattr(self.parallelism, name)
        return Problem(f"parallelism.{name}", value, f"does not divide {whole}", remedy, self._reads)

    @property
    def _reads(self) -> tuple[str, ...]:
        """The overrides that the sizes may come from."""
        return tuple(f"model.overrides.{name}" for name in (*self.sizes, "max_seq_len"))

    def _better(self, name: str, whole: int) -> str:
        """The remedy: the degrees that divide `whole`, and if possible everything else too."""
        divisors = [n for n in range(1, min(whole, _MOST_TRIED) + 1) if whole % n == 0]
        even = [n for n in divisors if self._with(**{name: n}).is_even]
        return f"use {either(even or divisors)}"

    def _with(self, **changes: object) -> "Division":
        section: Any = self.parallelism
        return replace(self, parallelism=replace(section, **changes))
