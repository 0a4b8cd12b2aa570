"""Every tensor of every family has the role, axes, parts and head_dim that are written down for it."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

import pytest
import torch

from hf_lowmem.roles import ROLES, assign_roles
from tests.support.expected_layouts import EXPECTED_ADAPTED, EXPECTED_LAYOUTS
from tests.support.expected_roles import EXPECTED, part_rows
from tests.support.model_families import ADAPTED, DECODER_LMS, FAMILIES, LAYOUTS, meta_model


@pytest.mark.parametrize("family", [*FAMILIES, *LAYOUTS, *ADAPTED])
def test_every_tensor_has_the_expected_role(family: str) -> None:
    table = (EXPECTED | EXPECTED_LAYOUTS | EXPECTED_ADAPTED)[family]
    unused = set(table)
    for _, found in assign_roles(meta_model(family)):
        patterns = [pattern for pattern in table if fnmatchcase(found.name, pattern)]
        assert patterns, f"{found} is not in the table"
        for pattern in patterns:
            assert dataclasses.replace(found, name="", shape=(), why="") == table[pattern], found
        unused -= set(patterns)
    assert not unused


@pytest.mark.parametrize("family", [*FAMILIES, *LAYOUTS, *ADAPTED])
def test_every_parameter_once_in_order_and_parts_fill_the_rows(family: str) -> None:
    model = meta_model(family)
    assigned = assign_roles(model)
    assert [id(param) for param, _ in assigned] == [id(param) for param in model.parameters()]
    assert len({found.name for _, found in assigned}) == len(assigned)
    for param, found in assigned:
        assert found.shape == tuple(param.shape)
        assert found.role in ROLES
        assert found.why
        if found.parts:
            assert found.fan_out is not None
            rows = torch.cat([part_rows(part, found.shape[found.fan_out]) for part in found.parts])
            assert rows.sort().values.tolist() == list(range(found.shape[found.fan_out]))


@pytest.mark.parametrize("family", DECODER_LMS)
def test_no_decoder_lm_has_an_unknown_role(family: str) -> None:
    assert not [found.name for _, found in assign_roles(meta_model(family)) if found.role == "unknown"]
