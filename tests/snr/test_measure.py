"""The signal-to-noise ratio against the authors' cases, and what may be averaged of each weight."""

from __future__ import annotations

import json
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_lowmem.roles import FusedPart, ParamRole
from hf_lowmem.snr import candidates, factored_snr, measure, snr, snr_of

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "snr_cases.json").read_text())["snr_float64_rescaled"]


@pytest.mark.parametrize("tile", [7, measure.CPU_TILE])
@pytest.mark.parametrize("case", CASES)
def test_authors_cases(case: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CPU_TILE", tile)
    v = load_file(GOLDEN / "snr_cases.safetensors")[case]
    for axes, expected in CASES[case].items():
        found = snr(v, literal_eval(axes))
        assert (found.shape, found.dtype) == ((), torch.float64)
        assert found.item() == pytest.approx(float("nan") if expected is None else expected, rel=1e-12, nan_ok=True)


def test_equal_entries_whose_mean_rounds_have_no_variance() -> None:
    v = torch.full((3, 1000), 0.1, dtype=torch.float64) * torch.tensor([[1.0], [0.7], [0.3]])
    assert snr(v, (1,)).isnan()
    assert snr(v, (0,)).isfinite()


def test_entries_that_are_not_finite_count_for_their_group_only() -> None:
    v = torch.rand(4, 50)
    expected = snr(v[1:], (1,))
    v[0, 3] = torch.inf
    torch.testing.assert_close(snr(v, (1,)), expected)


@pytest.mark.parametrize("tile", [50, measure.CPU_TILE])
def test_the_ratio_of_a_factored_estimate(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CPU_TILE", tile)
    v = torch.rand(3, 20, 30).square() * 1e-30
    each = []
    for matrix in v.double():
        row, col = matrix.mean(1, keepdim=True), matrix.mean(0, keepdim=True)
        estimate = row * col / row.mean()
        each.append((matrix - estimate).square().mean() / estimate.square().mean())
    torch.testing.assert_close(factored_snr(v, (2,), (1,)), 1 / torch.stack(each).mean())
    rank_1 = torch.rand(20, 1) * torch.rand(1, 30) * (1 + 1e-3 * torch.randn(20, 30))
    assert factored_snr(rank_1, (1,), (0,)) > 1e5 > snr(rank_1, (0, 1))


def test_a_matrix_of_rank_1_does_not_hide_the_others_and_one_of_zeros_does_not_count() -> None:
    v = torch.rand(3, 20, 30).double()
    alone = factored_snr(v[0], (1,), (0,))
    v[1] = torch.rand(20, 1).double() * torch.rand(1, 30)
    torch.testing.assert_close(factored_snr(v[:2], (2,), (1,)), 2 * alone)
    v[2] = 0
    torch.testing.assert_close(factored_snr(v, (2,), (1,)), 2 * alone)
    assert factored_snr(v[1:], (2,), (1,)) == torch.inf
    assert factored_snr(v[2:], (2,), (1,)).isnan()


def role_of(shape: tuple[int, ...], **fields: object) -> ParamRole:
    return ParamRole("weight", shape, **{"role": "mlp_up", "fan_out": 0, "fan_in": (1,), **fields})  # type: ignore[arg-type]


QKV = (
    FusedPart("attention_query", 1, 0, 8),
    FusedPart("attention_key", 1, 8, 12),
    FusedPart("attention_value", 1, 12, 16),
)
PER_HEAD = (
    FusedPart("attention_query", 2, 0, 4),
    FusedPart("attention_key", 2, 4, 6),
    FusedPart("attention_value", 2, 6, 8),
)


@pytest.mark.parametrize("parts", [QKV, PER_HEAD], ids=["contiguous", "per head"])
@pytest.mark.parametrize("fan_out", [0, 1])
def test_parts_of_fused_weights_are_measured_by_themselves(parts: tuple[FusedPart, ...], fan_out: int) -> None:
    shape = (16, 24) if fan_out == 0 else (24, 16)
    role = role_of(shape, role="attention_qkv", fan_out=fan_out, fan_in=(1 - fan_out,), head_dim=2, parts=parts)
    v = torch.rand(shape)
    found = candidates(role)
    assert [list(found[part]) for part in ("query", "key", "value")] == [
        ["fan_in", "fan_out", "head", "both", "row_col"],
        ["fan_in", "fan_out", "head", "both", "row_col"],
        ["fan_in", "fan_out", "both", "row_col"],
    ]
    for part in parts:
        repeats = v.unflatten(fan_out, (part.outer, -1)).narrow(fan_out + 1, part.start, part.stop - part.start)
        alone = repeats.flatten(fan_out, fan_out + 1)
        named = found[part.role.removeprefix("attention_")]
        expected = {
            "fan_in": snr(alone, (1 - fan_out,)),
            "fan_out": snr(alone, (fan_out,)),
            "both": snr(alone, (0, 1)),
        }
        expected["row_col"] = factored_snr(alone, (1 - fan_out,), (fan_out,))
        if "head" in named:
            heads = alone.unflatten(fan_out, (-1, 2))
            expected["head"] = snr(heads, (1, 2) if fan_out == 0 else (0, 2))
        torch.testing.assert_close({name: snr_of(v, segment) for name, segment in named.items()}, expected)


def test_axes_of_experts_and_vectors_are_not_averaged() -> None:
    experts = role_of((4, 6, 8), fan_out=1, fan_in=(2,), expert_axis=0)
    assert all(0 not in (*each.axes, *each.cross_axes) for each in candidates(experts)[""].values())
    assert candidates(role_of((8,), role="norm", fan_out=None, fan_in=())) == {}
    assert candidates(role_of((4, 6), role="bias", fan_out=None, fan_in=(), expert_axis=0)) == {}
