"""Means over groups of entries, against a brute-force average."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowmem.algorithms import SlimAdamW
from hf_lowmem.codecs import Float32
from hf_lowmem.moments import GroupMean, Segment, whole

CPU = torch.device("cpu")


def averaged(moment: GroupMean, value: torch.Tensor) -> torch.Tensor:
    state = {name: spec.zeros(CPU) for name, spec in moment.specs("v", tuple(value.shape), Float32()).items()}
    return moment.ema(state, "v", Float32(), value, 0.0)


def brute_force(value: np.ndarray, group_of: dict[tuple[int, ...], object]) -> np.ndarray:
    members: dict[object, list[float]] = {}
    for index, group in group_of.items():
        members.setdefault(group, []).append(float(value[index]))
    out = np.empty_like(value)
    for index, group in group_of.items():
        out[index] = np.mean(members[group])
    return out


shapes = st.lists(st.sampled_from([1, 2, 3, 5, 8]), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), shape=shapes)
def test_whole(data: st.DataObject, shape: tuple[int, ...]) -> None:
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    rows = data.draw(st.sampled_from([r for r in (1, 2, 4) if not kept or shape[kept[-1]] % r == 0]))
    value = torch.randn(shape, dtype=torch.float32)

    def group(index: tuple[int, ...]) -> tuple:
        return tuple(index[axis] // (rows if axis == kept[-1] else 1) for axis in kept)

    group_of = {index: group(index) for index in itertools.product(*map(range, shape))}
    moment = whole(shape, axes, rows)
    expected = brute_force(value.numpy(), group_of)
    np.testing.assert_allclose(averaged(moment, value).numpy(), expected, rtol=1e-5, atol=1e-6)
    (spec,) = moment.specs("v", shape, Float32()).values()
    assert int(np.prod(spec.shape)) == len(set(group_of.values()))
    for size, dim in zip(spec.shape, spec.param_dims, strict=True):
        assert dim is None or size == shape[dim]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("outer", "parts"), [(1, (8, 4, 4)), (4, (1, 1, 2)), (2, (4, 2, 2))])
def test_parts_of_fused_weights(axis: int, outer: int, parts: tuple[int, int, int]) -> None:
    """q by row, k by two rows, v by column; contiguous, or interleaved `outer` times."""
    n, other = 16, 6
    shape = (n, other) if axis == 0 else (other, n)
    edges = [0, parts[0], parts[0] + parts[1], sum(parts)]
    k_rows = 2 if parts[1] % 2 == 0 else 1
    moment = GroupMean(
        (
            Segment("q", axis, outer, edges[0], edges[1], (1 - axis,), 1),
            Segment("k", axis, outer, edges[1], edges[2], (1 - axis,), k_rows),
            Segment("v", axis, outer, edges[2], edges[3], (axis,), 1),
        )
    )
    value = torch.randn(shape)
    group_of = {}
    for index in itertools.product(range(shape[0]), range(shape[1])):
        repeat, within = divmod(index[axis], n // outer)
        if within < edges[1]:
            group_of[index] = ("q", index[axis])
        elif within < edges[2]:
            group_of[index] = ("k", repeat, (within - edges[1]) // k_rows)
        else:
            group_of[index] = ("v", index[1 - axis])
    expected = brute_force(value.numpy(), group_of)
    np.testing.assert_allclose(averaged(moment, value).numpy(), expected, rtol=1e-5, atol=1e-6)
    specs = moment.specs("v", shape, Float32())
    assert set(specs) == {"v_q", "v_k", "v_v"}
    assert sum(int(np.prod(s.shape)) for s in specs.values()) == len(set(group_of.values()))


def test_zero_dimensional() -> None:
    value = torch.tensor(3.0)
    assert averaged(whole((), (0,)), value) == 3.0


@pytest.mark.parametrize(("axes", "rows", "message"), [((2,), 1, "axes=(2,)"), ((1,), 3, "rows_per_block=3")])
def test_groups_that_do_not_fit(axes: tuple[int, ...], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match="does not") as error:
        whole((8, 4), axes, rows)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("axes", "cross_axes", "shape", "row", "col"),
    [
        ((1,), (0,), (8, 6), ((8, 1), (0, None)), ((1, 6), (None, 1))),
        ((0,), (1,), (6, 8), ((1, 8), (None, 1)), ((6, 1), (0, None))),
        ((2,), (1,), (3, 8, 6), ((3, 8, 1), (0, 1, None)), ((3, 1, 6), (0, None, 2))),
        ((1, 2, 3), (0,), (8, 6, 3, 3), ((8, 1, 1, 1), (0, None, None, None)), ((1, 6, 3, 3), (None, 1, 2, 3))),
    ],
)
def test_the_means_of_a_factored_weight_are_declared_along_its_axes(axes, cross_axes, shape, row, col):
    specs = whole(shape, axes, cross_axes=cross_axes).specs("exp_avg_sq", shape, Float32())
    found = {name: (spec.shape, spec.param_dims) for name, spec in specs.items()}
    assert found == {"exp_avg_sq_row": row, "exp_avg_sq_col": col}


def test_two_means_over_one_axis_are_refused():
    for axes, cross_axes, rows in (((1,), (1,), 1), ((0, 1), (0,), 1), ((1,), (0,), 4)):
        with pytest.raises(ValueError, match="must be over different axes, and its rows_per_block must be 1"):
            whole((8, 6), axes, rows, cross_axes)
    with pytest.raises(ValueError, match=r"cross_axes=\(0,\) needs axes"):
        SlimAdamW([torch.nn.Parameter(torch.ones(8, 6))], cross_axes=(0,))
