"""What every parameter of a model is: its role, which axes are fan_in and fan_out, and the parts of fused weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One piece of a fused weight (the query rows of a QKV projection, the gate half of gate|up).

    The fan_out axis, of size n, is viewed as (outer, n // outer); the part is `[:, start:stop]` of that view.
    A contiguous slice has outer = 1; GPT-NeoX interleaves by head (outer = heads); gpt-oss interleaves gate and up
    row by row (outer = n // 2).
    """

    role: str
    outer: int
    start: int
    stop: int


@dataclass(frozen=True)
class ParamRole:
    """The role of one parameter.

    `fan_out` is the output-feature axis, `fan_in` the input-feature axes; both are None / empty where the parameter
    has no such axes (vectors, unknown tensors). `expert_axis` is the axis of stacked experts, never averaged over.
    `head_dim` is the number of consecutive fan_out entries of one attention head (queries and keys only).
    `why` says in a few words what the role was read from.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    fan_out: int | None = None
    fan_in: tuple[int, ...] = ()
    expert_axis: int | None = None
    head_dim: int | None = None
    parts: tuple[Part, ...] = ()
    why: str = ""
