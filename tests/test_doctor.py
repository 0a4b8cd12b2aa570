"""`hf-lowmem doctor`: what it says of a sound installation, and what it says of broken ones."""

import json

import pytest
import torch

import hf_lowmem
from hf_lowmem import doctor
from hf_lowmem.cli import main
from hf_lowmem.kernels.cpu import library
from hf_lowmem.kernels.registry import choice
from hf_lowmem.stepping import step_bucket

HEADINGS = ["versions", "devices", "kernels", "registration", "self-test of a step", "environment", "broken"]


@pytest.fixture
def examined(capsys):
    """(exit status, what --json says)."""

    def examine():
        status = main(["doctor", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return examine


@pytest.fixture
def quick(monkeypatch):
    """The self-test of one name only."""
    monkeypatch.setattr(doctor, "OPTIM_NAMES", {"slim_adamw": hf_lowmem.cli.OPTIM_NAMES["slim_adamw"]})


def test_a_sound_installation(examined, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("MY_API_KEY", "secret")
    status, found = examined()
    assert list(found) == HEADINGS
    assert found["broken"] == []
    assert status == 0
    assert found["versions"]["torch"] == torch.__version__
    assert {"hf_lowmem", "python", "transformers", "accelerate", "trl", "peft", "triton"} <= set(found["versions"])
    assert found["kernels"]["CPU (compiled C)"].startswith("built" if library.library() else "missing")
    assert found["self-test of a step"] == dict.fromkeys(hf_lowmem.optim_names(), "ok")
    assert found["environment"]["OMP_NUM_THREADS"] == "2"
    assert found["environment"]["ACCELERATE_USE_FSDP"] == "false"
    assert "secret" not in str(found)


@pytest.mark.usefixtures("quick")
def test_the_report_is_at_most_100_columns_wide(capsys, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "word " * 60)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert all(heading in out for heading in HEADINGS[:-1])
    assert out.endswith("All is well.\n")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1e-3),
        lambda weight: weight.view(-1)[:1].fill_(float("nan")),
        lambda weight: weight.mul_(0.9),
        lambda weight: weight.view(-1)[-1:].add_(1.0),
    ],
)
def test_a_wrong_kernel_is_found(change, examined, monkeypatch):
    def wrong(bucket, hyper):
        step_bucket(bucket, hyper)
        if not choice():  # the rule's steps are right
            for param in bucket.params:
                change(param)

    monkeypatch.setattr("hf_lowmem.optimizer.step_bucket", wrong)
    status, found = examined()
    assert status == 1
    assert "float32 weights on cpu differ by" in found["self-test of a step"]["slim_adamw"]
    assert found["broken"][0].startswith("A step of slim_adamw is wrong: ")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("built", [True, False])
def test_kernels_that_are_missing_or_of_another_version(built, examined, monkeypatch):
    fault = "of another version:" if built else "missing: install a C compiler, such as gcc, and then"
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(library, "loaded", lambda: (None, fault))
    status, found = examined()
    assert "--no-cache-dir" in found["kernels"]["CPU (compiled C)"]
    said = found["kernels"]["CPU (compiled C)"]
    assert (status, said.split(":")[0]) == ((1, "of another version") if built else (0, "missing"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [ImportError("no internal _x"), RuntimeError("two\nlines"), KeyError("name")])
def test_a_part_that_fails_hides_no_other(error, examined, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("hf_lowmem.trainer.registration.register", fail)
    status, found = examined()
    assert status == 1
    assert found["broken"] == [f"registration: {type(error).__name__}: {' '.join(str(error).split())}"]
    assert found["self-test of a step"] == {"slim_adamw": "ok"}
    assert main(["doctor"]) == 1
    assert "BROKEN: registration: " in capsys.readouterr().out


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no_such_package"))
    assert doctor._versions([])["no_such_package"] == "not installed"
