"""A step on shards is the step on whole weights, for every name and every way to cut weights."""

from __future__ import annotations

from typing import Any

import pytest

from hf_lowmem.sharding import Processes, Tile
from hf_lowmem.state import TensorSpec
from hf_lowmem.state_place import can_be_cut
from hf_lowmem.trainer.names import OPTIM_NAMES
from tests.support.sharded_runs import Case, run_cases
from tests.support.slow import fast_only

pytestmark = pytest.mark.distributed

# Names whose steps take no sum over several processes, or take whole weights, and so are bit-equal. Others are so but
# for the weights that torch's fused AdamW steps, which takes the last entries of a tensor, and so of a shard, in
# another way on a CPU.
EXACT = ("signum", "smmf", "micro_adam", "coap_adafactor", "soap_8bit", "coap_adamw_8bit", "lowmem_adamw_8bit")
SMALL = {"coap": "rank=8,update_interval=1,", "soap": "precondition_frequency=1,"}  # whose bases change within 3 steps
PAPER = ("slim_adamw", "adam_mini", "adalayer")


def options(name: str, *more: str) -> str:
    eight_bits = "min_8bit_size=0" if name.endswith("_8bit") else ""
    return ",".join(filter(None, [SMALL.get(name[:4], "").strip(","), eight_bits, *more]))


EVERY_NAME = [Case(name, options(name), swaps=number % 2 == 1) for number, name in enumerate(OPTIM_NAMES)]
FAMILIES = [
    Case(name, options(name, *args), family=family)
    for family in ("gpt2", "gpt_neox", "phi3", "falcon_mqa", "mixtral")
    for name, *args in (("slim_adamw_8bit",), ("adam_mini", "rules=paper"), ("factored_adamw_8bit",))
]
ROUNDED = [
    Case(name, options(name, f"rounding={rounding}"), dtype="bfloat16")
    for name in ("lowmem_adamw_8bit", "slim_adamw", "adam_mini_8bit", "signum", "fadam", "h_fac", "smmf")
    for rounding in ("stochastic", "kahan")
]
OTHERS = [
    *[Case(name, options(name, "rules=paper")) for name in PAPER],
    *[Case(name, "state_bits=16") for name in ("slim_adamw", "factored_adamw", "adalayer", "fadam")],
    *[Case(name, options(name), clips=True, swaps=True) for name in ("slim_adamw", "factored_adamw", "h_fac", "smmf")],
    *[Case(name, dtype="float64", clips=True) for name in ("factored_adamw", "fadam", "h_fac", "smmf")],
    *[Case(name, options(name), grads="bfloat16") for name in ("fadam_8bit", "slim_adamw_8bit", "coap_adamw_8bit")],
    Case("slim_adamw_8bit", "rules=auto,calibration_steps=2,min_8bit_size=0", family="gpt_neox"),
    Case("factored_adamw", "rules=auto,calibration_steps=2", family="mixtral"),
]
CUTS = [
    Case("factored_adamw", cut="both", clips=True),
    Case("adam_mini", "rules=paper", family="gpt_neox", cut="both"),
    Case("slim_adamw_8bit", "min_8bit_size=0", family="mixtral", cut="both"),
    Case("slim_adamw", family="mixtral", cut="both"),
    Case("factored_adamw", family="phi3", cut="both"),
    Case("fadam", cut="both"),
    Case("h_fac", cut="copies"),
    Case("slim_adamw", family="gpt2", cut="copies", swaps=True, clips=True),
    Case("slim_adamw", family="gpt2", cut="columns"),
    Case("adalayer_8bit", "min_8bit_size=0", cut="columns"),
    Case("slim_adamw", "rounding=stochastic", cut="columns", dtype="bfloat16"),
    Case("smmf", cut="columns"),
    Case("micro_adam", "rounding=kahan", cut="both", dtype="bfloat16"),
    Case("soap_8bit", options("soap_8bit"), cut="both", clips=True),
    Case("coap_adamw_8bit", options("coap_adamw_8bit"), family="mixtral", cut="copies", swaps=True, clips=True),
    Case("slim_adamw_8bit", "min_8bit_size=0", cut="replicated", clips=True),
    Case("slim_adamw_8bit", "min_8bit_size=0", cut="offloaded", swaps=True, clips=True),
    Case("factored_adamw", "rounding=kahan", cut="offloaded", dtype="bfloat16"),
    Case("coap_adamw", options("coap_adamw"), cut="offloaded"),
]
FAST = [case for case in EVERY_NAME if case.optim in ("lowmem_adamw", "adam_mini", "smmf", "micro_adam", "h_fac")]
FAST += [case for case in EVERY_NAME if case.optim.endswith("_8bit") and "ada" in case.optim]
RUNS = {"two": (2, FAST), "two, others": (2, [case for case in EVERY_NAME if case not in FAST])}
RUNS |= {"three": (3, [*EVERY_NAME, *FAMILIES, *ROUNDED, *OTHERS]), "four": (4, CUTS)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what a case of a run has found; the same processes take all cases of a run."""
    known: dict[str, dict[str, dict[str, Any]]] = {}

    def of(run: str, case: Case) -> dict[str, Any]:
        if run not in known:
            world, cases = RUNS[run]
            known[run] = run_cases(cases, world, tmp_path_factory.mktemp(run))
        return known[run][str(case)]

    return of


def check(found: dict[str, Any], case: Case) -> None:
    assert "error" not in found, found["error"]
    if case.cut == "rows" and "auto" not in case.args:
        assert found["bytes"] == found["planned"]
    exact = (case.optim in EXACT or case.optim.removesuffix("_8bit") in EXACT) and not case.clips
    assert found["norms"] < 3e-7
    assert found["loads"] == 0
    if case.dtype == "bfloat16":
        # A sum in another order may turn a rounding over, which is one unit in the last place of a bfloat16.
        assert found["weights"] <= (0 if exact else 2.0**-8)
    elif case.clips and "8bit" in case.optim:
        assert found["weights"] < 1e-3  # a norm in another order may turn a code over
    else:
        assert found["weights"] <= (0 if exact else 3e-7)
    assert exact <= (found["state"] == 0)


@pytest.mark.parametrize(("entries", "fits"), [(254, False), (256, True), (250, False), (512, True)])
def test_an_8bit_block_is_not_cut_by_two_groups_either(entries: int, fits: bool) -> None:
    """254 entries are cut into 127 and 127 by tensor parallelism, and these into 64 and 63 by FSDP2."""
    tile = Tile((entries,), (0,), (64,), ((Processes(2), Processes(2)),))
    absmax = TensorSpec((-(-entries // 64),), (None,), block=64)
    assert can_be_cut(absmax, tile) == fits


@pytest.mark.parametrize("case", fast_only(EVERY_NAME, FAST), ids=str)
def test_every_name_on_two_processes(case: Case, found: Any) -> None:
    result = found("two" if case in FAST else "two, others", case)
    check(result, case)
    assert result["share"] < (0.56 if "h_fac" not in case.optim else 1.01)  # whose means of columns both hold


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS["three"][1], ids=str)
def test_on_three_processes_of_which_some_hold_nothing(case: Case, found: Any) -> None:
    check(found("three", case), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CUTS, ids=str)
def test_weights_that_are_cut_along_other_axes(case: Case, found: Any) -> None:
    check(found("four", case), case)
