"""COAP's options: ranks and ratios, and the errors that wrong values give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW
from hf_lowmem.trainer.optim_args import recipe_for
from tests.support.coap_runs import BOTH, gradients, random, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"^rank=0 must be a whole number of at least 1\.$"),
        ({"rank": 4, "rank_ratio": 4.0}, r"^rank=4 and rank_ratio=4\.0 both set the rank: give one of them\.$"),
        ({"update_interval": 0}, r"^update_interval=0 must be a whole number of at least 1\.$"),
        ({"reproject_factor": 0}, r"^reproject_factor=0 must be a whole number of at least 1\.$"),
        ({"rank_ratio": 0.5}, r"^rank_ratio=0\.5 must be .*at least 1"),
        ({"conv_rank_ratio": 0.5}, r"^conv_rank_ratio=0\.5 must be .*at least 1"),
        ({"scale": 0.0}, r"^scale=0\.0 must be a finite number above 0\.$"),
        ({"restore_state": "all"}, "restore_state='all' is not"),
        ({"eq5_scale": "unit"}, "eq5_scale='unit' is not"),
        ({"align": "signs"}, "align='signs' is not"),
        ({"proj_bits": 8}, "proj_bits=8 is not"),
        ({"ranks": 4}, "no (option|key) 'ranks'"),
    ],
)
@pytest.mark.parametrize("name", ["coap_adamw", "coap_adafactor"])
def test_bad_options_are_told_in_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    cls = recipe_for(name).optimizer_cls
    with pytest.raises((ValueError, TypeError), match=message):
        cls([nn.Parameter(torch.ones(64, 32))], **options)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(32, 64)})})
    for build_it in (
        lambda: hf_lowmem.build_optimizer(model, name, lr=1e-3, optim_args=options),
        lambda: hf_lowmem.explain(model, name, options),
    ):
        with pytest.raises(ValueError, match=message) as error:
            build_it()
        assert str(error.value).rstrip(".").count(". ") == 0


@pytest.mark.parametrize("group", [{"rank": 0}, {"rank_ratio": 0.5}, {"update_interval": 0}, {"align": "signs"}])
def test_bad_options_of_a_group_are_told_too(group: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(group))):
        CoapAdamW([{"params": [nn.Parameter(torch.ones(8, 4))], **group}])


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("shape", "rank"), [((64, 32), 32), ((32, 64), 33), ((3, 64, 32), 256)], ids=str)
def test_a_rank_that_would_keep_all_of_a_weight_is_no_rank_at_all(
    shape: tuple[int, ...], rank: int, bits: int, cls: type, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"stacked": len(shape) == 3, "state_bits": bits, "min_8bit_size": 0}
    start, grads = random(*shape), gradients(shape, 3)
    expected, _ = run(cls, start, grads, project=False, **options)
    assert "unprojected" not in caplog.text
    moved, state = run(cls, start, grads, rank=rank, **options)
    assert not any(name.startswith("proj") for name in state)
    assert state["exp_avg"].shape == shape
    if len(shape) == 2:  # statistics of a stack's matrices are each its own
        assert torch.equal(moved, expected)
    (line,) = [record.message for record in caplog.records if "unprojected" in record.message]
    assert f"leaves unprojected: 1, such as one of shape {shape} (its smaller side is 32: rank {rank}" in line


def test_weights_too_small_for_the_rank_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(8, 4), (4, 16), (16, 16), (8,)]
    first, second, large, vector = (nn.Parameter(torch.ones(size)) for size in sizes)
    groups = [
        {"params": [first, large]},
        {"params": [second, vector], "rank": 8},
        {"params": [vector.clone().detach()]},
    ]
    optimizer = CoapAdamW(groups, rank=5)
    (record,) = caplog.records
    assert "unprojected: 2, such as one of shape (8, 4) (its smaller side is 4: rank 5 would keep" in record.message
    large.grad = torch.ones_like(large)
    optimizer.step()
    assert optimizer.state[large]["proj"].shape == (5, 16)
    assert "proj" not in optimizer.state[second]


def test_a_groups_own_rank_or_ratio_wins() -> None:
    params = [nn.Parameter(torch.zeros(32, 16)) for _ in range(3)]
    groups = [{"params": [params[0]], "rank_ratio": 8.0}, {"params": [params[1]], "rank": 3}, {"params": [params[2]]}]
    optimizer = CoapAdamW(groups, rank=5)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert [len(optimizer.state[param]["proj"]) for param in params] == [2, 3, 5]
    with pytest.raises(ValueError, match="give one of them"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2, "rank_ratio": 2.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_rate": 0.8}, "decay_rate=0.8"),
        ({"clip_threshold": 0.0}, "clip_threshold=0"),
        ({"update_interval": None}, "update_interval=None"),
    ],
)
def test_adafactors_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoapAdafactor([nn.Parameter(torch.zeros(2, 2))], **options)
