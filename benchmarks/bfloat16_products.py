"""Measures what COAP and SOAP lose by bfloat16 products with a bfloat16 basis, as on CUDA, compared with float32.

    python benchmarks/bfloat16_products.py

It runs on a CPU. The product of two bfloat16 numbers is exact in float32, so a float32 product of operands that are
rounded to bfloat16 is what the tensor cores compute, except for the order of the sums. It measures

- how far the update of one step, after 100 others, is from that in float32 with the same state;
- how far the hundredth step of SOAP, by the bits of its moments and of its bases, is from that with 32 bits for both,
  for gradients whose standard deviations along the eigenvectors span some decades, of which SOAP magnifies the small;
- how far SOAP's bases are from orthogonal after many refreshes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import describe_machine  # noqa: E402

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW, Soap  # noqa: E402
from hf_lowmem.projections import precision  # noqa: E402

EIGHT_BITS = {"state_bits": 8, "lr": 1e-3, "betas": (0.9, 0.99)}
CASES: dict[str, tuple[type, tuple[int, ...]]] = {
    "coap_adamw_8bit, (768, 256)": (CoapAdamW, (768, 256)),
    "coap_adamw_8bit, (256, 768)": (CoapAdamW, (256, 768)),
    "coap_adamw_8bit, (128, 64, 3, 3)": (CoapAdamW, (128, 64, 3, 3)),
    "coap_adafactor_8bit, (768, 256)": (CoapAdafactor, (768, 256)),
    "soap_8bit, (768, 256)": (Soap, (768, 256)),
}
REFRESHES = (1, 10, 100)
DECADES = (1, 2, 3)
BITS = ((32, 16), (16, 32), (16, 16), (8, 32), (8, 16))  # the bits of the moments and of the bases


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Compute products with a bfloat16 basis on the CPU as CUDA does, inside the context."""
    with (
        patch.object(precision, "multiplies_bfloat16", lambda device: True),
        patch.object(precision, "bfloat16_product", lambda left, right: left.float() @ right.float()),
    ):
        yield


def gradients(shape: tuple[int, ...], seed: int = 0) -> Iterator[Tensor]:
    """Return noise around a mean of low rank, which gradients of layers resemble."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    rows, columns = shape[0], math.prod(shape[1:])
    mean = random(rows, 8) @ random(8, columns)
    while True:
        yield 1e-3 * (mean + random(rows, 8) @ random(8, columns) + random(rows, columns)).view(shape)


def take_steps(cls: type, shape: tuple[int, ...], steps: int, **options: Any) -> tuple[nn.Parameter, Any, Any]:
    grads, param = gradients(shape), nn.Parameter(torch.zeros(shape))
    optimizer = cls([param], **{**EIGHT_BITS, **options})
    for _, param.grad in zip(range(steps), grads, strict=False):
        optimizer.step()
    return param, optimizer, grads


def update_error(cls: type, shape: tuple[int, ...]) -> float:
    """Return |difference| / |update| for one step from the same state."""
    options = {"proj_bits": 32} if cls is Soap else {}
    param, optimizer, grads = take_steps(cls, shape, 100, **options)
    rounded = nn.Parameter(param.detach().clone())
    other = cls([rounded], **EIGHT_BITS)
    other.state[rounded] = {
        name: tensor.bfloat16() if name.startswith("proj_") and tensor.ndim else tensor.clone()
        for name, tensor in optimizer.state[param].items()
    }
    start, param.grad = param.detach().clone(), next(grads)
    rounded.grad = param.grad.clone()
    optimizer.step()
    with bfloat16_products():
        other.step()
    return ((rounded - param).norm() / (param - start).norm()).item()


def spread_gradients(rows: int, columns: int, decades: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    deviations = 10 ** (-decades * torch.arange(columns) / columns)
    mean = 0.3 * torch.randn(rows, columns, generator=generator)
    while True:
        noise = torch.randn(rows, columns, generator=generator)
        yield 1e-3 * (mean + noise) * deviations @ vectors


def hundredth_update(decades: int, state_bits: int, bits: int) -> Tensor:
    param = nn.Parameter(torch.zeros(256, 128))
    optimizer = Soap([param], **{**EIGHT_BITS, "state_bits": state_bits}, proj_bits=bits)
    with bfloat16_products():
        for _, param.grad in zip(range(100), spread_gradients(256, 128, decades), strict=False):
            before = param.detach().clone()
            optimizer.step()
    return param.detach() - before


def errors_by_bits(decades: int) -> list[float]:
    exact = hundredth_update(decades, 32, 32)
    return [((hundredth_update(decades, *bits) - exact).norm() / exact.norm()).item() for bits in BITS]


def orthogonality(bits: int) -> list[float]:
    """Return the largest singular value of Q^T Q - I after each number of refreshes."""
    found = []
    for refreshes in REFRESHES:
        options = {"proj_bits": bits, "precondition_frequency": 1}
        param, optimizer, _ = take_steps(Soap, (256, 256), refreshes + 1, **options)
        basis = optimizer.state[param]["proj_1"].double()
        found.append(torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(256, dtype=torch.float64), 2).item())
    return found


def measure(commit: str | None) -> dict[str, Any]:
    return {
        "machine": describe_machine("cpu", commit),
        "update_errors": {name: update_error(*case) for name, case in CASES.items()},
        "soap_bits": BITS,
        "soap_errors_by_decades": {decades: errors_by_bits(decades) for decades in DECADES},
        "refreshes": REFRESHES,
        "orthogonality": {"float32": orthogonality(32), "bfloat16": orthogonality(16)},
    }


def render(report: dict[str, Any]) -> str:
    lines = [
        "# Products with a basis in bfloat16 against float32",
        "",
        "How to run it, and what is compared: `benchmarks/bfloat16_products.py`.",
        "",
        f"- machine: {report['machine']['cpu']}, torch {report['machine']['versions']['torch']}",
        f"- commit: {report['machine']['commit']}",
        "",
        "| weight | error of a step's update |",
        "|---|---:|",
        *(f"| {name} | {error:.2%} |" for name, error in report["update_errors"].items()),
        "",
        f"| SOAP's update, bits of moments and bases | {' | '.join(f'{a}, {b}' for a, b in report['soap_bits'])} |",
        "|---|" + "---:|" * len(report["soap_bits"]),
        *(
            f"| decades: {decades} | {' | '.join(f'{error:.1%}' for error in errors)} |"
            for decades, errors in report["soap_errors_by_decades"].items()
        ),
        "",
        f"| SOAP's basis, norm of Q^T Q - I | {' | '.join(f'{n} refreshes' for n in report['refreshes'])} |",
        "|---|" + "---:|" * len(report["refreshes"]),
        *(
            f"| {dtype} | {' | '.join(f'{value:.1e}' for value in values)} |"
            for dtype, values in report["orthogonality"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "bfloat16_products_cpu.json")
    args = parser.parse_args()
    report = measure(args.commit)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
