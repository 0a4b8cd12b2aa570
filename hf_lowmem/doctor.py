"""`hf-lowmem doctor`: what a bug report needs. Each section is examined by itself: a failure hides no other."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_lowmem import __version__
from hf_lowmem.planner.tables import wrapped
from hf_lowmem.sizes import readable
from hf_lowmem.trainer.names import OPTIM_NAMES, legal_names

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "bitsandbytes", "triton")
VARIABLES = re.compile(
    r"ACCELERATE_.*|FSDP_.*|(HF|TRANSFORMERS|HF_DATASETS|HF_HUB)_OFFLINE|HF_HOME|(OMP|MKL)_NUM_THREADS|OMP_.*|KMP_.*|"
    r"CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|PYTORCH_(CUDA_)?ALLOC_CONF|TORCH_COMPILE_DISABLE|TORCHDYNAMO_DISABLE|"
    r"TRITON_.*|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|LD_PRELOAD|CC"
)
# The allowed difference, as a share of the weights' movement in three steps. It is larger for optimizers with 8-bit
# codes or signs (True), of which a few may fall on the other side of a rounding boundary, and for bfloat16 weights.
TOLERANCE = {"float32": {False: 1e-4, True: 0.005}, "bfloat16": {False: 0.02, True: 0.02}}
STEPS = 3

Section = dict[str, str]  # a text by name


def examine() -> dict[str, Any]:
    """Return all sections by heading, and under "broken" a list of sentences about what is wrong.

    Logging is disabled meanwhile.
    """
    broken: list[str] = []
    sections: dict[str, Callable[[list[str]], Section]] = {
        "versions": _versions,
        "devices": _devices,
        "kernels": _kernels,
        "registration": _registration,
        "self-test of a step": _self_test,
        "environment": _environment,
    }
    found: dict[str, Any] = {}
    logging.disable()
    try:
        for heading, section in sections.items():
            try:
                found[heading] = section(broken)
            except Exception as error:  # a broken installation may raise anything
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                found[heading] = {"failed": reason}
                broken.append(f"{heading}: {reason}")
    finally:
        logging.disable(logging.NOTSET)
    return {**found, "broken": broken}


def report(found: dict[str, Any]) -> str:
    """Return what `examine` has found as text of at most 100 columns."""
    lines = []
    for heading, section in found.items():
        if heading != "broken":
            width = max(map(len, section), default=0)
            lines += [heading, *(wrapped(f"{name:<{width}}  {text}", 2, width + 2) for name, text in section.items())]
            lines.append("")
    lines += [wrapped(f"BROKEN: {sentence}") for sentence in found["broken"]] or ["All is well."]
    return "\n".join(lines)


def _versions(broken: list[str]) -> Section:
    found = {"hf_lowmem": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices(broken: list[str]) -> Section:
    import torch

    found = {"cpu": f"{_cpu()}, {os.cpu_count()} threads, of which torch uses {torch.get_num_threads()}"}
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return {**found, "cuda": f"none; torch is built {f'for CUDA {built}' if built else 'for the CPU only'}"}
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = (
            f"{device.name}, {readable(device.total_memory)}, compute capability {device.major}.{device.minor}"
        )
    return {**found, "driver": f"{_driver()}; torch is built for CUDA {torch.version.cuda}"}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return model[1] if model else platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown, because nvidia-smi does not tell"


def _kernels(broken: list[str]) -> Section:
    import torch

    from hf_lowmem.kernels.cpu import library
    from hf_lowmem.kernels.cpu.reinstall import reinstall_command
    from hf_lowmem.kernels.triton.variants import triton_kernels

    built, fault = library.loaded()
    compiled = "built" if built else f"{fault} run `{reinstall_command()}`"
    if fault and not fault.startswith("missing"):
        broken.append(f"The compiled CPU kernels are {compiled}.")
    if not torch.cuda.is_available():
        triton = "not needed, there is no CUDA device"
    elif triton_kernels() is not None:
        triton = "usable"
    else:
        triton = "not usable: steps on the GPU take several times longer; see the warning at the first step"
        broken.append("The Triton kernels cannot be used on this machine's GPU.")
    return {"CPU (compiled C)": compiled, "GPU (Triton)": triton}


def _registration(broken: list[str]) -> Section:
    from hf_lowmem.trainer.registration import register

    register()
    return {"names in transformers": f"all {len(legal_names())} are legal values of optim"}


def _self_test(broken: list[str]) -> Section:
    """Compare steps of a small model with the kernels that are found against steps with the update rules alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    places = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    models = {
        (device, dtype): deepcopy(model).to(device, getattr(torch, dtype)) for device in places for dtype in TOLERANCE
    }
    found = {}
    for name in OPTIM_NAMES:
        said = []
        for (device, dtype), small in models.items():
            kernels, rule = _movement(name, small), _movement(name, small, kernels=False)
            off = float((kernels - rule).norm() / rule.norm())
            if not off <= TOLERANCE[dtype][name.endswith("_8bit") or name == "signum"]:
                said.append(f"{dtype} weights on {device} differ by {off:.1%} of their movement")
        broken += [f"A step of {name} is wrong: {sentence}." for sentence in said]
        found[name] = "; ".join(said) or "ok"
    return found


def _movement(name: str, model: Any, kernels: bool = True) -> Any:
    """Return how far a few steps move all weights of a copy of the model, with the same gradients in every call."""
    import torch

    from hf_lowmem.kernels import forced
    from hf_lowmem.trainer.build import build_optimizer

    model = deepcopy(model)
    weights = list(model.parameters())
    before = torch.nn.utils.parameters_to_vector(weights).detach().float()
    options = {"min_8bit_size": 64} if name.endswith("_8bit") else {}
    optimizer = build_optimizer(model, name, lr=1e-2, weight_decay=0.1, optim_args=options)
    generator = torch.Generator().manual_seed(1)
    with nullcontext() if kernels else forced("rule"):
        for _ in range(STEPS):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
            optimizer.step()
    return torch.nn.utils.parameters_to_vector(weights).detach().float() - before


def _environment(broken: list[str]) -> Section:
    return {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)} or {
        "none": "of the variables that change what happens is set"
    }
