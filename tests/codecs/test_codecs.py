"""8-bit state: the code map, the nearest code, blocks, and what a code map can and cannot hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_lowmem.codecs import BFloat16, Float32, Int8Blockwise, codec_for
from hf_lowmem.codecs.dynamic_map import boundaries, decode_lines, decode_table, encode_lines
from hf_lowmem.state import TensorSpec

CPU = torch.device("cpu")


def spec_of(shape: tuple[int, ...], signed: bool = True) -> TensorSpec:
    return TensorSpec(shape, tuple(range(len(shape))), signed=signed)


def stored(value: torch.Tensor, signed: bool = True, block_size: int = 256) -> dict[str, torch.Tensor]:
    codec, spec = Int8Blockwise(block_size), spec_of(tuple(value.shape), signed)
    state = {name: s.zeros(CPU) for name, s in codec.specs("x", spec).items()}
    codec.encode(state, "x", spec, value)
    return state


def restored(state: dict[str, torch.Tensor], signed: bool = True, block_size: int = 256) -> torch.Tensor:
    return Int8Blockwise(block_size).decode(state, "x", spec_of(tuple(state["x"].shape), signed))


def wide_range(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** (-6 * torch.rand(shape, generator=generator))


@pytest.mark.parametrize("signed", [True, False])
def test_code_map_equals_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(decode_table(signed, CPU), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_equal_bitsandbytes_definition(signed: bool) -> None:
    """Scale: the largest magnitude of 256 consecutive entries. Code: the nearest entry of bitsandbytes' map."""
    functional = pytest.importorskip("bitsandbytes.functional")
    value = wide_range((64, 1024))
    value = value if signed else value.square()
    state = stored(value, signed)
    blocks = (value if signed else value.sqrt()).view(-1, 256)
    scale = blocks.abs().amax(1)
    code_map = functional.create_dynamic_map(signed=signed).double()
    units = (blocks / scale[:, None]).double()
    nearest = (units[..., None] - code_map).abs().argmin(-1)
    assert torch.equal(state["x_absmax"].view(-1), scale)
    assert torch.equal(state["x"].view(-1, 256).long(), nearest)


@pytest.mark.parametrize("signed", [True, False])
def test_every_boundary_falls_on_its_side(signed: bool) -> None:
    edges = boundaries(signed)
    below = torch.nextafter(edges, torch.tensor(-2.0))
    probes = torch.stack([edges, below])
    value = torch.ones(2, 256)  # the last entry is 1, so that the scale is 1 and the probes are units
    value[:, :255] = probes
    codes = stored(value if signed else value.double().square().float(), signed)["x"].long()
    if signed:
        assert torch.equal(codes[0, :255], torch.arange(1, 256))
        assert torch.equal(codes[1, :255], torch.arange(255))


@pytest.mark.parametrize("signed", [True, False])
def test_compiled_form_of_the_map(signed: bool) -> None:
    """The straight lines give every code's value, and the nearest code but at the boundary of two."""
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(decode_lines(codes, signed), decode_table(signed, CPU), rtol=1e-6, atol=1e-12)
    units = wide_range((1 << 18,)).clamp(-1, 1)
    units = units if signed else units.abs()
    nearest = torch.bucketize(units, boundaries(signed), right=True)
    difference = (encode_lines(units, signed).long() - nearest).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-4


def test_second_moment_stored_directly_blows_the_step_up() -> None:
    """Why codes hold the square root: the square of the gradient spans more decades than the map does."""
    grad = torch.full((1, 256), 1e-5)
    grad[0, 0] = 1.0
    second = grad.square()
    exact_step = grad / (second.sqrt() + 1e-8)

    direct = restored(stored(second, signed=True))  # the signed map: no root is taken
    rooted = restored(stored(second, signed=False), signed=False)
    blown_up = (grad / (direct.sqrt() + 1e-8) / exact_step).max()
    assert 100 < blown_up < 10_000
    assert (grad / (rooted.sqrt() + 1e-8) / exact_step).max() < 2


def test_blocks_end_with_the_row() -> None:
    value = wide_range((3, 192))
    state = stored(value, block_size=64)
    assert state["x_absmax"].shape == (3, 3)
    alone = torch.cat([restored(stored(row[None], block_size=64), block_size=64) for row in value])
    assert torch.equal(restored(state, block_size=64), alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_entries_stay_out_of_the_scale(bad: float) -> None:
    value = wide_range((2, 256))
    broken = value.clone()
    broken[0, 7] = bad
    clean = value.clone()
    clean[0, 7] = 0.0
    assert torch.equal(restored(stored(broken)), restored(stored(clean)))


def test_zero_and_tiny_blocks() -> None:
    value = torch.zeros(3, 256)
    value[1] = 1e-44
    value[2, 0] = -3e38
    back = restored(stored(value))
    assert torch.isfinite(back).all()
    assert not back[0].any()
    assert back[2, 0] < -2.9e38


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 5), columns=st.integers(2, 1030), size=st.sampled_from([64, 128, 256]), seed=st.integers(0, 99)
)
def test_round_trip_is_close_and_stable(rows: int, columns: int, size: int, seed: int) -> None:
    value = wide_range((rows, columns), seed)
    state = stored(value, block_size=size)
    back = restored(state, block_size=size)
    scale = state["x_absmax"].repeat_interleave(size, dim=1)[:, :columns]
    assert ((back - value).abs() <= 0.0071 * scale + 1e-12).all()
    again = stored(back, block_size=size)
    tops = torch.stack([block.amax(1) for block in value.split(size, 1)], 1)
    positive_top = (tops == state["x_absmax"]).repeat_interleave(size, dim=1)[:, :columns]
    assert torch.equal(again["x"][positive_top], state["x"][positive_top])  # the map has no -1 to hold a negative top


def test_codec_for() -> None:
    assert codec_for((64, 512), 8, 256, 4096) == Int8Blockwise(256)
    assert codec_for((64, 384), 8, 256, 4096) == Int8Blockwise(128)
    assert codec_for((64, 512), 8, 64, 4096) == Int8Blockwise(64)
    assert codec_for((4, 256), 8, 256, 4096) == Float32()
    assert codec_for((7,), 16, 256, 4096) == BFloat16()


@pytest.mark.parametrize(
    ("shape", "block_size", "row_axes"),
    [
        ((1152, 4304), 256, 1),  # SigLIP: 16 x 269
        ((64, 513), 256, 1),
        ((64, 67), 67, 1),  # a row shorter than a block is one
        ((50021,), 256, 1),
        ((64, 1, 513), 256, 1),
        ((512, 64, 3, 3), 64, 3),  # rows of 9 x 64
        ((512, 30, 3, 3), 256, 3),  # rows of 270
        ((1152, 3, 14, 14), 196, 2),  # rows of one channel
        ((768, 1, 7, 7), 49, 3),  # a depthwise kernel; axis 0 stays apart
        ((3072, 1, 4), 4, 2),  # a depthwise kernel of Mamba
        ((5120, 16), 16, 1),  # A_log of Mamba
        ((5000, 1), 256, 2),  # no other row than a vector has
        ((1, 5000, 1), 256, 2),
        ((3, 2000, 40), 128, 2),
    ],
)
def test_rows_that_no_block_divides(shape: tuple[int, ...], block_size: int, row_axes: int) -> None:
    codec = codec_for(shape, 8, 256, 4096)
    assert codec == Int8Blockwise(block_size, row_axes)
    eight = sum(spec.nbytes for spec in codec.specs("x", spec_of(shape)).values())
    assert eight < 4 * math.prod(shape)


def test_a_short_block_is_of_the_largest_size_asked_for() -> None:
    assert codec_for((64, 513), 8, 64, 4096) == Int8Blockwise(64)
    assert codec_for((64, 63), 8, 64, 0) == Int8Blockwise(63)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (0, 300), (300, 0)])
def test_what_would_grow_or_is_empty_stays_float32(shape: tuple[int, ...]) -> None:
    assert codec_for(shape, 8, 256, 0) == Float32()


@pytest.mark.parametrize(("columns", "block_size"), [(96, 96), (102, 102), (514, 256), (8, 8), (37, 37), (300, 150)])
def test_projected_rows_take_a_divisor_before_a_short_block(columns: int, block_size: int) -> None:
    assert codec_for((4096, columns), 8, 256, 4096, any_divisor=True) == Int8Blockwise(block_size)


SHAPES = [(7, 513), (3, 257), (2, 3, 255), (1031,), (5, 65), (6, 3, 5, 7), (9, 1, 7, 7), (40, 16), (300, 1), (11, 2)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_block_is_coded_as_if_alone(shape: tuple[int, ...], signed: bool) -> None:
    """Scales and codes are those of whole blocks that hold the entries of one block and then zeros."""
    value = wide_range(shape)
    value = value if signed else value.square()
    codec, state = codec_for(shape, 8, 256, 0), {}
    state = {name: spec.zeros(CPU) for name, spec in codec.specs("x", spec_of(shape, signed)).items()}
    codec.encode(state, "x", spec_of(shape, signed), value)
    row, size = codec.row(shape), codec.block_size
    blocks = [block for line in value.view(-1, row) for block in line.split(size)]
    alone = [stored(nn.functional.pad(block, (0, size - len(block))), signed, size) for block in blocks]
    codes = torch.cat([one["x"][: len(block)] for one, block in zip(alone, blocks, strict=True)])
    assert torch.equal(state["x"].view(-1), codes)
    assert torch.equal(state["x_absmax"].view(-1), torch.cat([one["x_absmax"] for one in alone]))
    back = codec.decode(state, "x", spec_of(shape, signed))
    scale = state["x_absmax"].repeat_interleave(size, -1)[..., :row].reshape(shape)
    assert ((back - value).abs() <= (0.0071 if signed else 0.0143) * (scale if signed else scale.square())).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_entries_stay_out_of_a_short_block(bad: float) -> None:
    value = wide_range((2, 300))
    broken, clean = value.clone(), value.clone()
    broken[0, 290], clean[0, 290] = bad, 0.0
    assert all(map(torch.equal, stored(broken).values(), stored(clean).values()))


@pytest.mark.parametrize("block_size", [64, 100])
def test_a_shard_without_rows_is_stored_and_read(block_size: int) -> None:
    codec, spec = Int8Blockwise(block_size), TensorSpec((0, 256), (0, 1))
    state = {name: each.zeros(torch.device("cpu")) for name, each in codec.specs("exp_avg", spec).items()}
    codec.encode(state, "exp_avg", spec, torch.empty(0, 256))
    assert codec.decode(state, "exp_avg", spec).shape == (0, 256)
