"""AdamW's state becomes ours and comes back: averaged over the plan's groups, stored as the plan says."""

from __future__ import annotations

import pytest
import torch

from hf_lowmem.adamw_state import check_takes_adamw, from_adamw, is_adamw, to_adamw
from hf_lowmem.algorithms import Adalayer, AdamMini, LowMemAdamW, SlimAdamW

FUSED = (("query", 0, 2, 0, 4, (1,), 2), ("value", 0, 2, 4, 8, (0,), 1))
# class, options, shape, axes of the second moment that share a number (None: all parts differ)
LAYOUTS = [
    (LowMemAdamW, {}, (16, 128)),
    (SlimAdamW, {"axes": (1,)}, (16, 128)),
    (SlimAdamW, {"axes": (0,)}, (16, 128)),
    (SlimAdamW, {"axes": (1,)}, (3, 8, 64)),
    (AdamMini, {"axes": (1,), "rows_per_block": 4}, (16, 128)),
    (AdamMini, {"segments": FUSED}, (16, 64)),
    (Adalayer, {"axes": (0, 1)}, (16, 128)),
    (Adalayer, {"axes": (0,)}, (7,)),
    (LowMemAdamW, {}, ()),
]


def make_plan(cls, options, shape, bits, dtype=torch.float32, rounding="nearest"):
    storage = {"state_bits": bits, "block_size": 64, "min_8bit_size": 0}
    return cls.state_plan(shape, dtype, {**cls.plan_options(), **storage, **options, "rounding": rounding})


def trained(shape, dtype=torch.float32, steps=3, **options):
    """A parameter's AdamW state after a few steps."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = torch.optim.AdamW([param], lr=1e-3, **options)
    for _ in range(steps):
        param.grad = torch.randn(shape).to(dtype)
        optimizer.step()
    return optimizer.state[param]


def group_mean(value, cls_options, shape):
    """The mean of each entry's group, by plain indexing."""
    if "segments" in cls_options:
        mean = value.clone().view(2, 8, 64)
        for outer in range(2):
            query = mean[outer, :4].view(2, 2, 64).mean((1, 2), keepdim=True).expand(2, 2, 64).reshape(4, 64)
            mean[outer, :4] = query
        mean[:, 4:] = value.view(2, 8, 64)[:, 4:].mean((0, 1), keepdim=True)
        return mean.view(shape)
    axes, rows = cls_options.get("axes", ()), cls_options.get("rows_per_block", 1)
    if not axes:
        return value
    if rows > 1:
        blocks = value.view(-1, rows, shape[1])
        return blocks.mean((1, 2), keepdim=True).expand(blocks.shape).reshape(shape)
    return value.mean(axes, keepdim=True).expand(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(("cls", "options", "shape"), LAYOUTS)
def test_there_and_back(cls, options, shape, bits, dtype):
    saved = trained(shape, dtype)
    before = {name: tensor.clone() for name, tensor in saved.items()}
    plan = make_plan(cls, options, shape, bits, dtype)
    state = from_adamw(saved, plan, shape)
    specs = plan.specs(shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert state["step"] == 3
    back = to_adamw(state, plan, shape, torch.float32)
    assert back["step"] == 3
    assert all(
        tuple(back[name].shape) == shape and back[name].dtype == torch.float32 for name in back if name != "step"
    )
    first, second = saved["exp_avg"].float(), group_mean(saved["exp_avg_sq"].float(), options, shape)
    coded = state["exp_avg"].dtype == torch.uint8
    if coded:  # half a step of the code beside the block's largest
        assert (back["exp_avg"] - first).abs().max() <= 0.03 * first.abs().max()
        assert ((back["exp_avg_sq"].sqrt() - second.sqrt()).abs().max()) <= 0.03 * second.sqrt().max()
    else:
        exact = 0 if state["exp_avg"].dtype == torch.float32 else 2**-8
        torch.testing.assert_close(back["exp_avg"], first, rtol=exact, atol=0)
        torch.testing.assert_close(back["exp_avg_sq"], second, rtol=1e-5, atol=0)
    assert all(torch.equal(saved[name], before[name]) for name in saved)


@pytest.mark.parametrize("bits", [32, 8])
def test_the_way_back_leaves_the_state_alone_and_is_in_the_weights_dtype(bits):
    plan = make_plan(SlimAdamW, {"axes": (1,)}, (8, 64), bits, torch.bfloat16)
    state = from_adamw(trained((8, 64), torch.bfloat16), plan, (8, 64))
    before = {name: tensor.clone() for name, tensor in state.items()}
    back = to_adamw(state, plan, (8, 64), torch.bfloat16)
    assert back["exp_avg"].dtype == back["exp_avg_sq"].dtype == torch.bfloat16
    assert back["step"].dtype == torch.float32
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_the_state_is_no_view_of_what_was_saved():
    saved = trained((4, 4))
    state = from_adamw(saved, make_plan(LowMemAdamW, {}, (4, 4), 32), (4, 4))
    state["exp_avg"].zero_()
    assert saved["exp_avg"].any()


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7.0), torch.tensor(7)])
def test_any_form_of_the_step(step):
    saved = {**trained((4,)), "step": step}
    state = from_adamw(saved, make_plan(LowMemAdamW, {}, (4,), 32), (4,))
    assert state["step"].dtype == torch.float32
    assert state["step"] == 7


def test_amsgrads_maximum_is_left_out_and_kahans_error_starts_at_zero():
    saved = trained((4, 64), torch.bfloat16, amsgrad=True)
    assert "max_exp_avg_sq" in saved
    state = from_adamw(saved, make_plan(LowMemAdamW, {}, (4, 64), 32, torch.bfloat16, "kahan"), (4, 64))
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "kahan_comp"}
    assert torch.equal(state["exp_avg_sq"], saved["exp_avg_sq"].float())
    assert not state["kahan_comp"].any()


def test_a_step_that_follows_is_adamws():
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(8, 64))
    adamw = torch.optim.AdamW([theirs], lr=1e-2)
    for _ in range(3):
        theirs.grad = torch.randn(8, 64)
        adamw.step()
    ours = torch.nn.Parameter(theirs.detach().clone())
    optimizer = LowMemAdamW([ours], lr=1e-2, weight_decay=0.01)
    optimizer.state[ours] = from_adamw(adamw.state[theirs], make_plan(LowMemAdamW, {}, (8, 64), 32), (8, 64))
    ours.grad = theirs.grad = torch.randn(8, 64)
    adamw.step()
    optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"step": 1, "state1": torch.zeros(4, dtype=torch.uint8), "state2": torch.zeros(4)}, "bitsandbytes"),
        ({"step": 1, "__bnb_optimizer_quant_state__": {}}, "bitsandbytes"),
        ({"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}, r"\['exp_avg', 'exp_avg_sq'\] is not AdamW's"),
        ({"momentum_buffer": torch.zeros(4)}, r"\['momentum_buffer'\] is not AdamW's"),
        (
            {"step": 1, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4), "mu_product": 1.0},
            "mu_product.*is not AdamW's",
        ),
        ({"step": 1, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(5)}, r"'exp_avg_sq' has shape \(5,\)"),
        ({"step": 1, "exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(4)}, r"'exp_avg' has shape \(2, 2\)"),
    ],
)
def test_other_state_is_refused_in_one_sentence(saved, message):
    with pytest.raises(ValueError, match=message) as error:
        from_adamw(saved, make_plan(LowMemAdamW, {}, (4,), 32), (4,))
    assert "\n" not in str(error.value)


def test_whose_groups_are_adamws():
    def looks_so(optimizer, state=None):
        return is_adamw(optimizer.state_dict()["param_groups"], state or {})

    param = torch.nn.Parameter(torch.zeros(4, 4))
    assert looks_so(torch.optim.AdamW([param]))
    assert looks_so(torch.optim.Adam([param], amsgrad=True))
    assert looks_so(torch.optim.RAdam([param]), {0: {"state1": 0, "state2": 0}})  # as bitsandbytes keeps it
    for other in (torch.optim.RAdam, torch.optim.NAdam, torch.optim.Adamax, torch.optim.Adafactor, SlimAdamW):
        assert not looks_so(other([param]))
    assert not looks_so(torch.optim.SGD([param], lr=0.1))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.AdamW([p], maximize=True), "maximize=True"),
        (lambda p: torch.optim.Adam([p], weight_decay=0.1), "weight decay inside of the gradient"),
    ],
)
def test_steps_that_cannot_be_carried_on_are_refused(optimizer, message):
    groups = optimizer(torch.nn.Parameter(torch.zeros(4, 4))).state_dict()["param_groups"]
    with pytest.raises(ValueError, match=rf"{message}.*'slim_adamw'.*delete optimizer\.pt"):
        check_takes_adamw(groups, "adamw", "slim_adamw")


@pytest.mark.parametrize("rule", ["transformers_adamw", "adafactor", "soap", "signum"])
def test_other_rules_do_not_take_it(rule):
    with pytest.raises(ValueError, match=r"optim='coap_adamw_8bit'.*delete optimizer\.pt and scheduler\.pt"):
        check_takes_adamw([], rule, "coap_adamw_8bit")
    check_takes_adamw([], "adamw", "slim_adamw")
