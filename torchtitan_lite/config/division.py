"""What the degrees of the mesh must divide: heads, widths, the vocabulary and the sequence."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm
from typing import Any, Protocol

from torchtitan_lite.config.problem import Problem

_MOST_TRIED = 1024


class Parallelism(Protocol):
    """What is read of the parallelism section."""

    @property
    def tensor_parallel_degree(self) -> int: ...

    @property
    def context_parallel_degree(self) -> int: ...

    @property
    def context_parallel_method(self) -> str: ...

    @property
    def context_parallel_load_balancer(self) -> str: ...

    def problems(self, key: str, world_size: int) -> list[Problem]: ...


@dataclass(frozen=True, kw_only=True)
class Division:
    """A mesh and what it divides."""

    parallelism: Parallelism
    world_size: int
    seq_len: int
    max_seq_len: int | None
    """Longest sequence of the model; None where that is not known."""
    sizes: dict[str, int]
    """What tensor parallel divides, by the decoder's field; without fields that are not known."""
    dealt_by_ulysses: str
    """The one of these fields that counts the heads which Ulysses deals out."""
    extensible: str
    """The one of these fields that may be larger than the data needs."""

    def problems(self) -> list[Problem]:
        """What is left over, for degrees that are in range and any number of ranks."""
        return [
            *(self._tensor_problems() if self.undivided else ()),
            *(self._heads_problems() if self.heads_left else ()),
            *(self._sequence_problems() if self.seq_len % self.unit else ()),
        ]

    @property
    def is_even(self) -> bool:
        """Whether the ranks come out even, and nothing is left over."""
        if self.parallelism.problems("parallelism", self.world_size):
            return False
        return not (self.undivided or self.heads_left or self.seq_len % self.unit)

    @cached_property
    def undivided(self) -> list[str]:
        """The names of the sizes that tensor parallel does not divide."""
        degree = self.parallelism.tensor_parallel_degree
        return [name for name, size in self.sizes.items() if size % degree]

    @property
    def tensor(self) -> int:
        """The degree of tensor parallel; 1 where it is refused, so that only the rest is judged."""
        return 1 if self.undivided else self.parallelism.tensor_parallel_degree

    @property
    def heads(self) -> int:
        """Key and value heads of a rank, which Ulysses deals out; 0 where they are not known."""
        return self.sizes.get(self.dealt_by_ulysses, 0) // self.tensor

    @property
    def heads_left(self) -> int:
        """Heads that Ulysses would leave over."""
        is_ulysses = self.parallelism.context_parallel_method == "ulysses"
        return self.heads % self.parallelism.context_parallel_degree if is_ulysses else 0

    @property
    def n_chunks(self) -> int:
        """Equal chunks of the sequence that each rank of context parallel has."""
        mesh = self.parallelism
        is_balanced = mesh.context_parallel_degree > 1 and mesh.context_parallel_load_balancer == "headtail"
        return 2 if is_balanced and mesh.context_parallel_method == "allgather" else 1

    @property
    def unit(self) -> int:
        """What the sequence must be a multiple of."""
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
        return [Problem("training.seq_len", self.seq_len, rule, remedy)]

    def _problem(self, name: str, whole: str, remedy: str) -> Problem:
        value = getattr(self.parallelism, name)
        return Problem(f"parallelism.{name}", value, f"does not divide {whole}", remedy)

    def _better(self, name: str, whole: int) -> str:
        """The degrees that divide `whole`; only those that come out even in all else, where there are any."""
        divisors = [n for n in range(1, min(whole, _MOST_TRIED) + 1) if whole % n == 0]
        even = [n for n in divisors if self._with(**{name: n}).is_even]
        return f"use {either(even or divisors)}"

    def _with(self, **changes: object) -> "Division":
        section: Any = self.parallelism
        return replace(self, parallelism=replace(section, **changes))


def either(choices: list[int] | list[str]) -> str:
    """The choices in words: "1, 2 or 4"."""
    words = list(map(str, choices))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
