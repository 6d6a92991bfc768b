"""The test cases of every op, from its spec: each variant of its example inputs, in float64 on small odd shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from internvit.ops.backends.registry import backends_for
from internvit.ops.core.spec import SPECS, TINY, Arguments, Inputs, OpSpec, Size, differentiable


@dataclass(frozen=True)
class Case:
    """One variant of an op's example inputs."""

    spec: OpSpec
    variant: str

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.variant}" if self.variant else self.spec.name

    def backends(self, dtype: torch.dtype = torch.float32, head_dim: int = 8) -> list[str]:
        """The backends that can run it on CPU tensors on this machine."""
        return backends_for(self.spec.implemented_as, "cpu", dtype, head_dim, **self.spec.demands(self.variant))

    def make(self, generator: torch.Generator, size: Size = TINY) -> Arguments:
        return self.spec.examples[self.variant](Inputs(size, generator, torch.float64))

    def tensors(self, arguments: Arguments) -> dict[str, Tensor]:
        """The arguments that have gradients."""
        return differentiable(arguments)

    def run(self, arguments: Arguments, backend: str | None = None) -> tuple[Tensor, ...]:
        return self.spec.run(arguments, backend)


CASES = tuple(Case(spec, variant) for spec in SPECS.values() for variant in spec.examples)


def backends_here(op: str) -> list[str]:
    """The backends that can run `op` on CPU tensors on this machine."""
    return backends_for(SPECS[op].implemented_as, "cpu", torch.float32, 8)


CASES_AND_BACKENDS = [(c, backend) for c in CASES for backend in c.backends()]
