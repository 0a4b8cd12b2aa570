"""A moment with one number per entry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowmem.state import Codec, State, TensorSpec


@dataclass(frozen=True)
class Full:
    """A moment with one number per entry of the parameter, stored by the plan's codec."""

    signed: bool = True

    def spec(self, shape: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(shape, tuple(range(len(shape))), signed=self.signed)

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        return codec.specs(name, self.spec(shape))

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        spec = self.spec(tuple(value.shape))
        held = codec.decode(state, name, spec).to(value.dtype)
        if isinstance(beta, Tensor):  # a compiled step's
            estimate: Tensor = beta * held + (1 - beta) * value
        elif self.signed:
            estimate = held.lerp_(value, 1 - beta)
        else:  # a square that overflows stays infinite, where lerp_ would make it NaN at the next step
            estimate = held.mul_(beta).add_(value, alpha=1 - beta)
        if estimate is not state[name]:  # it is where the codec stores numbers as they are
            codec.encode(state, name, spec, estimate)
        return estimate

    def describe(self, name: str) -> str:
        return ""
