"""A run moves from adamw_torch to our names in mid-training, and back."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

import hf_lowmem
from hf_lowmem.cli import main
from hf_lowmem.trainer.names import OPTIM_NAMES
from tests.support.slow import fast_only, slow
from tests.support.small_trainer import StopAt, make_trainer, three_steps

FAMILY = [
    (name, bits)
    for name, optim in OPTIM_NAMES.items()
    if optim.algorithm in ("lowmem_adamw", "factored_adamw", "slim_adamw", "adam_mini", "adalayer")
    for bits in ((8,) if optim.state_bits == 8 else (32, 16))
]
OTHERS = [name for name in OPTIM_NAMES if name not in dict(FAMILY)]


class AtStart(TrainerCallback):
    """The state and the learning rates that a run starts from."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        copied = optimizer.optimizer.state.items()
        self.state = {param: {name: tensor.clone() for name, tensor in of.items()} for param, of in copied}
        self.rates = {float(group["lr"]) for group in optimizer.param_groups}


def inner(trainer):
    return trainer.optimizer.optimizer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    """A checkpoint of adamw_torch, and the losses of the run that goes on."""
    output = tmp_path_factory.mktemp("adamw")
    checkpoint = three_steps(output, "adamw_torch")
    whole = make_trainer(output, "adamw_torch", save_strategy="no")
    whole.train(resume_from_checkpoint=str(checkpoint))
    return checkpoint, losses(whole)


@pytest.mark.parametrize(("optim", "bits"), fast_only(FAMILY, [case for case in FAMILY if case[1] != 16]))
def test_our_names_start_from_adamws_checkpoint(optim, bits, adamw, tmp_path):
    checkpoint, expected = adamw
    options = "min_8bit_size=0" if bits == 8 else f"state_bits={bits}"
    if not optim.startswith("lowmem_adamw"):  # limited updates are shorter than AdamW's where all gradients are alike
        options += ",update_limit=inf"
    trainer = make_trainer(tmp_path, optim, options, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 8
    assert all(state["step"] == 8 for state in inner(trainer).state.values())
    assert len(losses(trainer)) == len(expected) == 8
    for mine, theirs in zip(losses(trainer), expected, strict=True):
        assert mine == pytest.approx(theirs, rel=0.02)
    if (optim, bits) == ("lowmem_adamw", 32):
        assert losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_the_moments_are_adamws(adamw, tmp_path):
    checkpoint, _ = adamw
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    trainer = make_trainer(tmp_path, "slim_adamw", "rules=paper", save_strategy="no")
    loaded = AtStart()
    trainer.add_callback(loaded)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    named = {name: param for name, param in trainer.model.named_parameters()}
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    order = [n for n in named if n in decayed] + [n for n in named if n not in decayed]
    for key, name in enumerate(order):
        state, theirs = loaded.state[named[name]], saved["state"][key]
        assert torch.equal(state["exp_avg"], theirs["exp_avg"]), name
        axes = [axis for axis, size in enumerate(state["exp_avg_sq"].shape) if size != named[name].shape[axis]]
        assert axes or "norm" in name, name
        mean = theirs["exp_avg_sq"].mean(axes, keepdim=True) if axes else theirs["exp_avg_sq"]
        torch.testing.assert_close(state["exp_avg_sq"], mean)
    assert loaded.rates == {float(group["lr"]) for group in saved["param_groups"]}


@pytest.mark.parametrize("written_by", ["adamw_torch_fused", slow("adamw_torch"), slow("adamw_torch amsgrad")])
def test_other_forms_of_adamws_checkpoint(written_by, tmp_path):
    checkpoint = three_steps(tmp_path / "a", written_by.split()[0], dtype=torch.bfloat16)
    if "amsgrad" in written_by:
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        for state in saved["state"].values():
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
        for group in saved["param_groups"]:
            group["amsgrad"] = True
        torch.save(saved, checkpoint / "optimizer.pt")
    trainer = make_trainer(tmp_path / "b", "slim_adamw_8bit", dtype=torch.bfloat16, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(state["step"] == 8 and "max_exp_avg_sq" not in state for state in inner(trainer).state.values())
    assert not any(group.get("amsgrad") for group in inner(trainer).param_groups)


@pytest.mark.parametrize("optim", fast_only(OTHERS, ("signum", "coap_adamw", "soap_8bit")))
def test_the_others_say_what_to_delete(optim, adamw, tmp_path):
    checkpoint, _ = adamw
    trainer = make_trainer(tmp_path, optim, save_strategy="no")
    with pytest.raises(ValueError, match=rf"optim='{optim}' cannot.*delete optimizer\.pt and scheduler\.pt") as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(error.value)


def test_what_is_said_to_delete_works(tmp_path):
    checkpoint = three_steps(tmp_path / "a", "adamw_torch")
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    trainer = make_trainer(tmp_path / "b", "coap_adamw", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 8
    assert all(state["step"] == 5 for state in inner(trainer).state.values())


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("lowmem_adamw", None),
        slow("slim_adamw", "update_limit=inf"),
        ("slim_adamw_8bit", "min_8bit_size=0,update_limit=inf"),
        slow("adam_mini", "state_bits=16,value=tensor,update_limit=inf"),
        slow("adalayer_8bit", "min_8bit_size=0,rules=paper"),
    ],
)
def test_the_way_back(optim, options, tmp_path, capsys):
    checkpoint = three_steps(tmp_path / "ours", optim, optim_args=options)
    converted = tmp_path / "back" / "checkpoint-3"
    argv = ["--optim_args", options] if options else []
    assert main(["convert", str(checkpoint), "--to", "adamw_torch", "--output", str(converted), *argv]) == 0
    assert "resume from it with optim=adamw_torch" in capsys.readouterr().out
    assert {path.name for path in converted.iterdir()} == {path.name for path in checkpoint.iterdir()}
    saved = torch.load(converted / "optimizer.pt", weights_only=True)
    trainer = make_trainer(tmp_path / "theirs", "adamw_torch", save_strategy="no")
    assert saved["param_groups"][0].keys() >= set(trainer.create_optimizer().state_dict()["param_groups"][0])
    assert len(saved["param_groups"]) == 2
    trainer.train(resume_from_checkpoint=str(converted))
    assert all(state["step"] == 8 for state in inner(trainer).state.values())

    ours = make_trainer(tmp_path / "on", optim, options, save_strategy="no")
    ours.train(resume_from_checkpoint=str(checkpoint))
    assert losses(trainer) == pytest.approx(losses(ours), rel=0.02)
    if optim == "lowmem_adamw":
        assert losses(trainer) == pytest.approx(losses(ours), rel=1e-4)


def test_the_function_takes_a_model_of_any_kind(tmp_path):
    trainer = make_trainer(tmp_path, "slim_adamw_8bit", "min_8bit_size=0", dtype=torch.bfloat16)
    trainer.model.lm_head.requires_grad_(False)
    trainer.add_callback(StopAt())
    trainer.train()
    converted = hf_lowmem.to_adamw(tmp_path / "checkpoint-3", trainer.model, "slim_adamw_8bit", "min_8bit_size=0")
    trainable = [param for param in trainer.model.parameters() if param.requires_grad]
    assert len(converted["state"]) == len(trainable)
    assert all(state["exp_avg_sq"].dtype == torch.bfloat16 for state in converted["state"].values())
    of_dict = hf_lowmem.to_adamw(inner(trainer).state_dict(), trainer.model, "slim_adamw_8bit", "min_8bit_size=0")
    for key, state in converted["state"].items():
        assert all(torch.equal(tensor, of_dict["state"][key][name]) for name, tensor in state.items())


@pytest.mark.parametrize("optim", ["signum", "coap_adamw", "soap_8bit", "coap_adafactor"])
def test_there_is_no_way_back_from_the_others(optim, tmp_path, capsys):
    trainer = make_trainer(tmp_path, optim)
    trainer.create_optimizer()
    with pytest.raises(ValueError, match=f"^optim={optim!r} keeps moments that are not AdamW's"):
        hf_lowmem.to_adamw(trainer.optimizer.state_dict(), trainer.model, optim)


def test_the_command_answers_mistakes_in_one_sentence(adamw, tmp_path, capsys):
    checkpoint, _ = adamw

    def refused(*argv):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", *map(str, argv)])
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    new = ("--to", "adamw_torch", "--output", tmp_path / "new")
    assert "was not written by an optim of this package" in refused(checkpoint, *new)
    assert "there is no such folder" in refused(tmp_path / "missing", *new)
    assert "exists already" in refused(checkpoint, "--to", "adamw_torch", "--output", tmp_path)
    assert "invalid choice" in refused(checkpoint, "--to", "sgd", "--output", tmp_path / "new")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "trainer_state.json").write_text(json.dumps({}))
    assert "holds no weights" in refused(tmp_path / "adapter", *new)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize(("optim", "remedy"), [("slim_adamw_8bit", "hf-lowmem convert"), ("coap_adamw", "delete")])
def test_a_checkpoint_of_ours_is_not_read_by_adamw(optim, remedy, by_path, tmp_path):
    """torch's AdamW would load it, and fail in the step or take the state for its own."""
    folder = three_steps(tmp_path, optim)
    resumed = make_trainer(tmp_path, "adamw_torch", save_strategy="no")
    with pytest.raises(ValueError, match=rf"optimizer\.pt was written by .*'adamw_torch' cannot read: .*{remedy}"):
        resumed.train(resume_from_checkpoint=str(folder) if by_path else True)
