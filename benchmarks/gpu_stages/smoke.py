"""Checks that the kernels agree with the update rules, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from presets import build_model
from torch import Tensor, nn
from transformers import LlamaConfig

import hf_lowmem
from gpu_stages.session import Session
from hf_lowmem.algorithms import LowMemAdamW, SlimAdamW
from hf_lowmem.codecs.dynamic_map import decode_table
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.kernels.triton import launch
from hf_lowmem.kernels.triton.launch import Launch
from hf_lowmem.kernels.triton.passes import TritonPasses

NAMES = (
    *("lowmem_adamw_8bit", "slim_adamw", "slim_adamw_8bit", "adam_mini_8bit", "signum_8bit", "coap_adamw_8bit"),
    *("factored_adamw", "factored_adamw_8bit", "smmf", "micro_adam", "fadam_8bit", "h_fac"),
)
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
STEPS = 3
NEEDS_GPU = "needs a GPU of 24 GiB"
COLUMNS = 4096
MANY = 2**31 + 2**24  # a number of entries that int32 cannot count
# The largest legal difference as a share of the largest weight, and the least share of equal entries. An 8-bit code
# may fall to either side of a boundary.
WORST, SHARE = 2.0**-5, 0.9


def run(session: Session) -> None:
    failed = []
    good: bool | None
    for name, check in checks(session.device):
        try:
            said, good = check(), True
            if said == NEEDS_GPU:
                good = None
        except Exception as error:
            said, good = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", False
            failed.append(name)
        session.row(name, right=good, remark=said)
    if failed:
        raise RuntimeError(f"{len(failed)} checks have failed, the first is {failed[0]}")


def checks(device: str) -> Iterator[tuple[str, Callable[[], str | None]]]:
    yield "every code survives a step", lambda: codes_survive(device)
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{name} {str(dtype).removeprefix('torch.')}", lambda n=name, d=dtype: follows_the_rule(n, d, device)
    yield "the same step twice", lambda: same_twice(device)
    yield "a view that is not aligned", lambda: view_not_aligned(device)
    yield "another stream", lambda: another_stream(device)
    yield "more entries than int32 counts", lambda: many_entries(device)


def codes_survive(device: str) -> None:
    """Check both 8-bit maps, decoding and encoding: with a gradient of zero the scales decay and the codes stay."""
    param = nn.Parameter(torch.zeros(8, 256, device=device))
    optimizer = LowMemAdamW([param], lr=0.0, betas=(0.5, 0.25), state_bits=8, min_8bit_size=0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state, codes = optimizer.state[param], torch.arange(256, dtype=torch.uint8, device=device).expand(8, 256)
    for name, beta in (("exp_avg", 0.5), ("exp_avg_sq", 0.5)):  # the codes of the second moment stand for its root
        state[name].copy_(codes)
        state[f"{name}_absmax"].fill_(beta)
    values = {name: decode_table(name == "exp_avg", codes.device)[codes.int()] for name in ("exp_avg", "exp_avg_sq")}
    optimizer.step()
    for name, expected in values.items():
        found = decode_table(name == "exp_avg", codes.device)[state[name].int()]
        require(torch.equal(found, expected), f"{int((found != expected).sum())} codes of {name} have changed")
        torch.testing.assert_close(state[f"{name}_absmax"], torch.full_like(state[f"{name}_absmax"], 0.25))


def follows_the_rule(name: str, dtype: torch.dtype, device: str) -> str:
    """Compare a few steps by the kernels and by the rule from the same weights."""
    with forced("rule"):
        expected = trained(name, dtype, device)
    with launched() as kernels:
        found = trained(name, dtype, device)
    require(kernels or device != "cuda", "no kernel was launched")
    worst, share = 0.0, 1.0
    for mine, theirs in zip(found, expected, strict=True):
        off, largest = (mine - theirs).abs(), float(theirs.abs().max())
        require(bool(mine.isfinite().all()), "a weight is not finite")
        worst = max(worst, float(off.max()) / largest)
        share = min(share, float((off <= 1e-5 * largest).float().mean()))
    require(worst <= WORST, f"a weight is {worst:.1e} of the largest away from the rule's")
    require(share >= SHARE, f"only {share:.1%} of a weight's entries are the rule's")
    by = f", by {', '.join(sorted(kernels))}" if kernels else ""
    return f"at most {worst:.1e} of the largest away, {share:.2%} equal{by}"


@contextmanager
def launched() -> Iterator[set[str]]:
    """Return the kinds of launch: second moment and when its means are computed, or the rule of a step in passes."""
    kinds: set[str] = set()
    step, add, passes = Launch.step, launch.add, TritonPasses.step

    def one_launch(self: Launch, *args: Any) -> None:
        kinds.add(f"{self.variant.second} {self.variant.means}")
        step(self, *args)

    def one_add(*args: Any) -> None:
        kinds.add("add")
        add(*args)

    def in_passes(self: TritonPasses, bucket: Bucket, hyper: Hyper) -> None:
        kinds.add(bucket.rule)
        passes(self, bucket, hyper)

    with ExitStack() as stack:
        for owner, name, function in (
            (Launch, "step", one_launch),
            (launch, "add", one_add),
            (TritonPasses, "step", in_passes),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield kinds


def trained(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return the weights as float32 after a few steps."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(CONFIG, dtype, device)
    weights = list(model.parameters())
    optimizer = hf_lowmem.build_optimizer(model, name, lr=1e-3, weight_decay=0.1)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) / 50)
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
        optimizer.step()
    return [weight.detach().float() for weight in weights]


def same_twice(device: str) -> None:
    for name in NAMES:
        once, again = trained(name, torch.bfloat16, device), trained(name, torch.bfloat16, device)
        same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        require(same, f"{name} takes another step the second time")


def view_not_aligned(device: str) -> None:
    """Check that a weight that starts at entry 1 of its storage takes the same step as an aligned one."""
    start = torch.randn(64 * 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    moved = torch.zeros(start.numel() + 1, dtype=start.dtype, device=device)[1:].copy_(start)
    for cls, options in ((LowMemAdamW, {}), (SlimAdamW, {"axes": (1,)}), (SlimAdamW, {"axes": (0,)})):
        found = []
        for weights in (start, moved):
            param = nn.Parameter(weights.view(64, 256).detach())
            before = param.detach().clone()
            optimizer = cls([param], lr=1e-3, state_bits=8, **options)
            for _ in range(2):
                param.grad = before.clone()
                optimizer.step()
            found.append(param.detach().clone())
            param.data.copy_(before)
        require(torch.equal(*found), f"{cls.__name__} {options} steps a view otherwise")


def another_stream(device: str) -> str | None:
    if device != "cuda":
        return NEEDS_GPU
    expected = trained("slim_adamw_8bit", torch.bfloat16, device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = trained("slim_adamw_8bit", torch.bfloat16, device)
    stream.synchronize()
    require(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "the step is another one")
    return None


def many_entries(device: str) -> str | None:
    """Check that the last rows of a weight of more than 2^31 entries take the same step as by themselves."""
    if device != "cuda" or torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        return NEEDS_GPU
    rows, last = MANY // COLUMNS, 64
    big = nn.Parameter(torch.zeros(rows, COLUMNS, dtype=torch.bfloat16, device=device))
    big.grad = torch.ones_like(big)
    few = torch.randn(last, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    with torch.no_grad():
        big[-last:], big.grad[-last:] = few, few.flip(0)
    small = nn.Parameter(few.clone())
    small.grad = few.flip(0)
    for cls, options in ((LowMemAdamW, {}), (SlimAdamW, {"axes": (1,)})):
        for param in (big, small):
            cls([param], lr=1e-2, state_bits=8, **options).step()
        require(torch.equal(big[-last:], small), f"{cls.__name__} steps the last rows otherwise")
        require(bool((big[0] == big[1]).all() and big[0, 0] != 0), f"{cls.__name__} leaves the first rows")
    return None


def require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
