"""Conversion between the state of torch's AdamW and the state that a plan declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.state import State, StatePlan

MOMENTS = ("exp_avg", "exp_avg_sq")
LEFT_OUT = "max_exp_avg_sq"  # the state of amsgrad, for which no plan has a place
QUANTIZED = {"state1", "state2", "__bnb_optimizer_quant_state__"}  # the state of bitsandbytes, even with 32 bits
ANEW = "delete optimizer.pt and scheduler.pt from the checkpoint's folder to start the optimizer and its schedule anew"


def is_adamw(groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
    """Return whether torch's AdamW or Adam wrote a state dict, or bitsandbytes, whose groups look the same."""
    quantized = any(isinstance(each, Mapping) and QUANTIZED & set(each) for each in state.values())
    return all(
        "algorithm" not in group and {"betas", "eps"} <= set(group) and ("amsgrad" in group or quantized)
        for group in groups
    )


def check_takes_adamw(groups: Iterable[Mapping[str, Any]], rule: str, optim: str) -> None:
    """Raise ValueError if an optimizer cannot continue the steps of AdamW.

    It cannot if its moments are not averages of the gradient and of its square, or if the saved groups maximize or add
    the weight decay to the gradient, as Adam does.

    Args:
        groups: the saved parameter groups.
        rule: the optimizer's update rule.
        optim: the optimizer's name, which the message mentions.
    """
    for group in groups:
        coupled = group.get("decoupled_weight_decay") is False and group.get("weight_decay", 0) > 0
        if group.get("maximize") or coupled:
            flag = "maximize=True" if group.get("maximize") else "weight decay inside of the gradient (Adam's)"
            raise ValueError(
                f"The checkpoint's optimizer state was written with {flag}, which optim={optim!r} does not support: "
                f"{ANEW}."
            )
    if rule != "adamw":
        raise ValueError(
            f"The checkpoint's optimizer state was written by AdamW, whose moments optim={optim!r} cannot take over: "
            f"{ANEW}."
        )


@torch.no_grad()
def from_adamw(saved: Mapping[str, Any], plan: StatePlan, shape: tuple[int, ...]) -> State:
    """Return the state that `plan` declares for a parameter of `shape`, filled from the state that AdamW saved.

    The moments are averaged over the plan's groups and stored by its codec. The maximum of amsgrad is dropped, and the
    compensation of Kahan rounding starts at zero.

    Args:
        saved: AdamW's state of the parameter: `exp_avg` and `exp_avg_sq` of its shape in any float dtype, and `step`,
            a number or a tensor.
        plan: a plan of the AdamW family, see `check_takes_adamw`.
        shape: the shape of the parameter.

    Returns:
        New tensors on the device of `exp_avg`, except `step`, which is on the CPU.

    Raises:
        ValueError: the state is not AdamW's, or that of another parameter.
    """
    if QUANTIZED & set(saved):
        raise ValueError(f"The checkpoint's optimizer state was quantized by bitsandbytes and cannot be read: {ANEW}.")
    if set(saved) - {LEFT_OUT} != {"step", *MOMENTS}:
        raise ValueError(f"The checkpoint's optimizer state {sorted(saved)} is not AdamW's step and moments: {ANEW}.")
    for name in MOMENTS:
        if not isinstance(saved[name], Tensor) or not saved[name].is_floating_point():
            raise ValueError(f"The checkpoint's AdamW state {name!r} is not a tensor of floats: {ANEW}.")
        if tuple(saved[name].shape) != tuple(shape):
            raise ValueError(
                f"The checkpoint's AdamW state {name!r} has shape {tuple(saved[name].shape)}, but its parameter has "
                f"{tuple(shape)}: resume with the same model."
            )
    device = saved["exp_avg"].device
    state = {name: spec.zeros(device) for name, spec in plan.specs(tuple(shape)).items()}
    state["step"].fill_(float(saved["step"]))
    for name, moment in plan.bind(state, tuple(shape)).items():
        moment.ema(saved[name].to(plan.arithmetic), 0.0)
    return state


@torch.no_grad()
def to_adamw(state: State, plan: StatePlan, shape: tuple[int, ...], dtype: torch.dtype) -> State:
    """Return `state` as the state of torch's AdamW for a parameter of `shape` and `dtype`.

    Every entry of a group gets the mean of the group, and 8-bit codes are decoded. `state` is not changed.

    Returns:
        `step`, which is a 0-D float32 tensor on the CPU, and both moments in `dtype` on the device of the state.
    """
    held = {name: tensor.clone() for name, tensor in state.items()}
    still = torch.zeros(shape, dtype=plan.arithmetic, device=held["exp_avg"].device)
    moments: dict[str, Tensor] = {name: bound.ema(still, 1.0) for name, bound in plan.bind(held, tuple(shape)).items()}
    step = held["step"].to("cpu", torch.float32)
    return {"step": step, **{name: moments[name].expand(shape).to(dtype) for name in MOMENTS}}
