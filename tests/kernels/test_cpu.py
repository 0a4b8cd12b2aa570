"""The compiled CPU kernels against the rules, and what happens without them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hf_lowmem
from hf_lowmem.algorithms import AdamMini, FactoredAdamW, LowMemAdamW, Signum, SlimAdamW
from hf_lowmem.codecs.dynamic_map import boundaries, decode_table
from hf_lowmem.kernels import BACKENDS, forced
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.kernels.columns import CPU_PART, SCALARS
from hf_lowmem.kernels.cpu import library as cpu_library
from hf_lowmem.kernels.cpu import reinstall
from hf_lowmem.kernels.parts import geometry
from hf_lowmem.kernels.tiles import Tiles
from tests import ROOT
from tests.support.declarations import FULL_SPACE, STORAGES, each_variant
from tests.support.kernel_runs import RAGGED, by_rule, run
from tests.support.model_families import FAMILIES, tiny_model
from tests.support.slow import slow

NAMES = ["lowmem_adamw", "slim_adamw", "factored_adamw", "adam_mini", "adalayer", "signum"]
ROUNDINGS = ["nearest", "stochastic", "kahan"]
built = pytest.mark.skipif(
    cpu_library.library() is None and shutil.which("cc") is None, reason="there is no C compiler here"
)


@built
def test_the_library_is_built() -> None:
    assert cpu_library.library() is not None


# More than 2^21 entries in a group are shared between units; fewer than 2^16 share one; rows longer than a run.
LARGE: list[tuple[type, dict[str, Any], tuple[int, ...]]] = [
    (SlimAdamW, {"axes": (0,)}, (4500, 512)),
    (SlimAdamW, {"axes": (1,)}, (3, 2_200_064)),
    (SlimAdamW, {"axes": (0, 1)}, (4500, 512)),
    (SlimAdamW, {"axes": (1,)}, (2, 2100, 1024)),
    (SlimAdamW, {"axes": (1,)}, (700, 768)),
    (SlimAdamW, {"axes": (0,), "update_limit": 0.5}, (1500, 1536)),
    (SlimAdamW, {"axes": (0, 1), "update_limit": 0.5}, (1500, 1536)),
    (FactoredAdamW, {}, (1500, 1536)),
    (FactoredAdamW, {"axes": (1,), "cross_axes": (2,)}, (2, 300, 1024)),
    (AdamMini, {"axes": (1,), "rows_per_block": 64}, (1024, 768)),
    (LowMemAdamW, {}, (300, 1024)),
    (Signum, {}, (300, 1024)),
]


def check_against(
    by_the_rule: tuple[Tensor, dict[str, Tensor]], mine: Tensor, state: dict[str, Tensor], may_flip: bool = True
) -> None:
    """Raise unless weight and state are the rule's.

    Args:
        may_flip: whether a code, a sign or a weight's neighbour may fall to either side of a boundary in a few places.
    """
    theirs, expected = by_the_rule
    for name, value in {"param": mine, **state}.items():
        reference = theirs if name == "param" else expected[name]
        if name == "kahan_comp":
            continue  # in units of the weight's last place: compared with the weight
        off, largest = (value - reference).abs(), float(reference.abs().max())
        exact = off <= 1e-6 * largest + 1e-6 * reference.abs()
        assert may_flip or exact.all(), (name, off.max())
        assert exact.sum() >= 0.95 * exact.numel() - 1, name
        assert off.max() <= 2.0**-5 * largest, name  # two codes, in three steps


@built
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", [32, slow(16), 8])
@pytest.mark.parametrize(("cls", "options", "shape"), LARGE, ids=lambda value: str(value).replace(" ", ""))
def test_large_weights_follow_the_rules(cls, options, shape, bits, rounding) -> None:
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    options = {**options, "state_bits": bits, "rounding": rounding}
    start = torch.randn(shape).to(dtype)
    with forced("cpu"):
        mine, state = run(cls, options, start)
    may_flip = bits < 32 or rounding == "stochastic" or cls is Signum
    check_against(by_rule(cls, options, start), mine, state, may_flip)


@built
@each_variant([d for d in FULL_SPACE if d.cls is FactoredAdamW], geometries=True, storages=STORAGES)
def test_factored_weights_of_every_layout_follow_the_rules(cls, options, shape) -> None:
    rounding = options.get("rounding", "nearest")
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    start = start.to(torch.float32 if rounding == "nearest" else torch.bfloat16)
    with forced("cpu"):
        mine, state = run(cls, options, start)
    check_against(by_rule(cls, options, start), mine, state, may_flip="state_bits" in options)


@built
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("cls", "options", "shape"), RAGGED, ids=lambda value: str(value).replace(" ", ""))
def test_rows_that_end_in_a_short_block_follow_the_rules(cls, options, shape, rounding) -> None:
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    options = {**options, "state_bits": 8, "min_8bit_size": 0, "rounding": rounding}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with forced("cpu"):
        mine, state = run(cls, options, start)
    check_against(by_rule(cls, options, start), mine, state)


@built
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_rows_of_8_bit_blocks(data: st.DataObject) -> None:
    """Random shapes about the edges of blocks, and averaged axes: compiled, in tiles of plain torch, by the rule."""
    columns = data.draw(st.sampled_from([1, 2, 3, 7, 31, 63, 64, 65, 127, 129, 191, 255, 256, 257, 511, 513, 769]))
    before = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=0, max_size=3))
    shape = (*before, columns)
    cls = data.draw(st.sampled_from([LowMemAdamW, Signum, SlimAdamW]))
    axes = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(shape))))))) if cls is SlimAdamW else ()
    options = {"state_bits": 8, "min_8bit_size": 0, "block_size": data.draw(st.sampled_from([64, 128, 256]))}
    options |= {"axes": axes} if axes else {}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs, expected = by_rule(cls, options, start)
    with forced("cpu", "tiles"):
        results = [run(cls, options, start)]
    with pytest.MonkeyPatch.context() as patch, forced("tiles", "rule"):
        patch.setattr("hf_lowmem.kernels.means.TILE", 1024)
        results.append(run(cls, options, start))
    for mine, state in results:
        for name, value in {"param": mine, **state}.items():
            reference = theirs if name == "param" else expected[name]
            off, largest = (value - reference).abs(), float(reference.abs().max())
            exact = off <= 2e-6 * largest + 2e-6 * reference.abs()
            assert exact.sum() >= 0.95 * exact.numel() - 1, name
            limit = 0.1 if name == "param" and cls is Signum else 2.0**-5 * largest  # a sign may flip
            assert off.max() <= limit, name


@built
def test_a_short_block_is_the_same_compiled_and_in_plain_torch() -> None:
    """One step from zero has no code on a boundary: codes and scales are equal bit for bit."""
    state: list[dict[str, Tensor]] = []
    for backend in ("cpu", "tiles"):
        param = nn.Parameter(torch.zeros(7, 4304))
        optimizer = LowMemAdamW([param], betas=(0.5, 0.5), state_bits=8)
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
        with forced(backend):
            optimizer.step()
        state.append(dict(optimizer.state[param]))
    for name, tensor in state[0].items():
        assert tensor.dtype == torch.float32 or tensor.shape == param.shape
        same = (tensor == state[1][name]).float().mean()
        assert same == 1 if tensor.dtype == torch.float32 else same > 0.9999, name
    assert state[0]["exp_avg_absmax"].shape == (7, 17)


def stepped(grads: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The last step's change of a zero weight, and the state. Rows end in 1, so each block's scale is 1."""
    param = nn.Parameter(torch.zeros(len(grads[0]), 256))
    optimizer = LowMemAdamW(
        [param], lr=1.0, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0, state_bits=8, min_8bit_size=0
    )
    for grad in grads:
        param.grad = grad
        param.detach().zero_()
        optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    return param.detach(), optimizer.state[param]


@built
def test_codes_are_the_nearest_up_to_rounding_at_a_boundary() -> None:
    """At every boundary between two codes, the floats beside it, and a sweep of all that lies between."""
    edges = torch.cat([boundaries(True), boundaries(False)])
    beside = [torch.nextafter(edges, torch.full_like(edges, to)) for to in (-2.0, 2.0)]
    sweep = torch.logspace(-9, 0, 1 << 15, dtype=torch.float64).float()
    x = torch.cat([edges, *beside, edges * (1 + 2.0**-20), edges * (1 - 2.0**-20), sweep, -sweep]).clamp(-1, 1)
    x = nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    _, state = stepped([nn.functional.pad(x, (0, 1), value=1.0)])  # the moments are the gradient and its square
    for name, value in {"exp_avg": x, "exp_avg_sq": x.abs()}.items():
        nearest = torch.bucketize(value, boundaries(name == "exp_avg"), right=True)
        off = (state[name][:, :255].int() - nearest).abs()
        assert off.max() <= 1
        edges = nn.functional.pad(boundaries(name == "exp_avg"), (1, 1), value=torch.inf)
        closest = torch.minimum((value - edges[nearest]).abs(), (value - edges[nearest + 1]).abs())
        assert (closest[off > 0] <= 2.0**-21 * value[off > 0].abs()).all()


@built
def test_the_code_map_round_trips_every_code() -> None:
    codes = torch.arange(256)
    values = torch.stack([decode_table(signed, torch.device("cpu")) for signed in (True, False)])
    _, state = stepped([values])
    assert torch.equal(state["exp_avg"][0].long(), codes)
    assert torch.equal(state["exp_avg_sq"][1].long(), codes)
    change, _ = stepped([values, torch.zeros(2, 256)])
    first = decode_table(True, torch.device("cpu"))[state["exp_avg"].long()]
    root = decode_table(False, torch.device("cpu"))[state["exp_avg_sq"].long()]
    quotient = torch.where(root > 0, first / root, 0)
    torch.testing.assert_close(change / change[0, 255], quotient, rtol=2e-6, atol=1e-9)


@built
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_groups(data: st.DataObject) -> None:
    """Random shapes, averaged axes and blocks of rows, against plain torch."""
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 64]), min_size=1, max_size=3)))
    axes = data.draw(st.sets(st.sampled_from(range(len(shape)))))
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    block = data.draw(st.sampled_from([b for b in (1, 2, 4, 8) if not kept or shape[kept[-1]] % b == 0]))
    options = {"axes": tuple(sorted(axes)), **({"rows_per_block": block} if kept else {})}
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mine, state = run(AdamMini, options, start)
    theirs, expected = by_rule(AdamMini, options, start)
    torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(mine, theirs, rtol=3 * 2.0**-7 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


@built
@pytest.mark.parametrize("name", [*NAMES, *(f"{name}_8bit" for name in NAMES)])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    results, threads = [], torch.get_num_threads()
    # The only weight of a step may be shared between threads where it would not be beside others.
    layers_of_models = [[(1024, 2304), (300, 700)]]
    if name.startswith(("slim_adamw", "factored_adamw", "adam_mini", "adalayer")):
        layers_of_models += [[(1024, 1200)], [(70_000, 20)]]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            found = list[Tensor]()
            for layers in layers_of_models:
                model = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in layers))
                optimizer = hf_lowmem.build_optimizer(model, name, lr=1e-3, weight_decay=0.1)
                for param in model.parameters():
                    param.grad = torch.randn(param.shape)
                optimizer.step()
                moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
                found += [*(param.detach() for param in model.parameters()), *moments]
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
def test_stochastic_rounding_draws_the_noise_of_the_rules() -> None:
    options = {"axes": (1,), "rounding": "stochastic"}
    start = torch.randn(64, 256).bfloat16()
    mine, _ = run(SlimAdamW, options, start)
    theirs, _ = by_rule(SlimAdamW, options, start)
    assert (mine == theirs).float().mean() > 0.999  # other noise would differ in a third


@built
def test_a_weight_inside_of_its_storage() -> None:
    options = {"axes": (1,), "rounding": "stochastic", "state_bits": 8, "min_8bit_size": 0}
    whole = torch.randn(40, 256).bfloat16()
    inside, _ = run(SlimAdamW, options, whole.clone()[8:])
    alone, _ = run(SlimAdamW, options, whole[8:].clone())
    assert torch.equal(inside, alone)


@built
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["slim_adamw", "factored_adamw", "adam_mini"])
def test_every_family_is_covered(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the gates of gpt-oss, which alternate with other columns."""
    model = tiny_model(family)
    left: list[tuple[int, ...]] = []

    class Left(Tiles):
        def step(self, bucket: Bucket, hyper: Hyper) -> None:
            left.extend(tuple(param.shape) for param in bucket.params)
            super().step(bucket, hyper)

    monkeypatch.setitem(BACKENDS, "tiles", Left())
    optimizer = hf_lowmem.build_optimizer(model, name, lr=1e-3)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    with forced("torch_fused", "cpu", "tiles"):
        optimizer.step()
    assert bool(left) == (family == "gpt_oss")


@pytest.mark.parametrize(
    ("shape", "strides", "dims", "expected"),
    [
        ((6, 4), (4, 1), (1,), (6, 6, 0, 4, 1, 1, 0, 0, 4, False)),
        ((6, 4), (4, 1), (0,), (1, 1, 0, 0, 6, 6, 0, 4, 4, True)),
        ((6, 4), (4, 1), (0, 1), (1, 1, 0, 0, 1, 1, 0, 0, 24, False)),
        ((2, 3, 5, 4), (120, 20, 4, 1), (2, 3), (6, 3, 120, 20, 1, 1, 0, 0, 20, False)),
        ((6, 4), (1, 6), (1,), None),  # the last dimension is not contiguous
        ((2, 3, 2, 3, 2, 3), (540, 90, 30, 9, 3, 1), (1, 3, 5), None),  # three loops of groups
    ],
)
def test_geometry(shape: Any, strides: Any, dims: Any, expected: Any) -> None:
    found = geometry(shape, strides, 7, dims)
    assert found == (None if expected is None else (*expected, 7))


@pytest.mark.parametrize(
    ("name", "dtype", "times"),
    [
        ("slim_adamw_8bit", torch.float32, 1),
        ("lowmem_adamw", torch.bfloat16, 1),
        ("signum", torch.float32, 1),
        ("lowmem_adamw", torch.float32, 0),  # torch's fused AdamW takes these steps, as it does with a compiler
    ],
)
def test_without_a_compiler_steps_are_taken_and_that_is_said_once(name, dtype, times, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cpu_library, "LIBRARY", Path("missing.so"))
    cpu_library.library.cache_clear()
    try:
        layer = nn.Linear(64, 64, dtype=dtype)
        optimizer = hf_lowmem.build_optimizer(layer, name, lr=1e-2)
        before = layer.weight.detach().clone()
        for _ in range(2):
            layer(torch.ones(64, dtype=dtype)).sum().backward()
            optimizer.step()
        assert not torch.equal(before, layer.weight)
    finally:
        cpu_library.library.cache_clear()
    assert caplog.text.count("install a C compiler, such as gcc, and then run `pip install --no-cache-dir") == times


@built
def test_a_library_of_another_source_is_not_loaded(monkeypatch, caplog) -> None:
    monkeypatch.setattr("zlib.crc32", lambda data: 1)
    cpu_library.library.cache_clear()
    try:
        assert cpu_library.library() is None
        assert "of another version: run `pip install --no-cache-dir" in caplog.text
    finally:
        cpu_library.library.cache_clear()


def test_a_library_that_cannot_be_loaded_is_said(monkeypatch, tmp_path: Path, caplog) -> None:
    (tmp_path / "_native.so").write_text("of another platform")
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "_native.so")
    cpu_library.library.cache_clear()
    try:
        assert cpu_library.library() is None
        assert re.search("not loadable .*file too short|not loadable .*invalid ELF", caplog.text)
    finally:
        cpu_library.library.cache_clear()


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_has_one_openmp() -> None:
    code = (
        "from hf_lowmem.kernels.cpu.library import library\nassert library()\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) <= 1


@pytest.mark.parametrize(
    ("recorded", "origin"),
    [
        (None, "hf_lowmem"),
        ({"url": "file:///src/hf_lowmem", "dir_info": {}}, "file:///src/hf_lowmem"),
        ({"url": "file:///dist/hf_lowmem-0.1.0.tar.gz", "archive_info": {}}, "file:///dist/hf_lowmem-0.1.0.tar.gz"),
        (
            {"url": "ssh://git@host/hf_lowmem", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "git+ssh://git@host/hf_lowmem@0a1b",
        ),
        ({"url": "file:///a%20folder/x y"}, "'file:///a%20folder/x y'"),
    ],
)
def test_the_advice_names_what_was_installed(recorded: Any, origin: str, monkeypatch, tmp_path: Path) -> None:
    """As pip records it; its cache is passed over, as that may hold a wheel without kernels."""
    info = tmp_path / "hf_lowmem-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf_lowmem\nVersion: 0.1.0\n")
    if recorded:
        (info / "direct_url.json").write_text(json.dumps(recorded))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reinstall, "CLONE", tmp_path)
    said = reinstall.reinstall_command()
    assert said == f"pip install --no-cache-dir --force-reinstall --no-deps {origin}"
    (tmp_path / "setup.py").touch()
    assert reinstall.reinstall_command().endswith(f"--no-deps -e {tmp_path}")


def test_a_folder_on_the_path_alone_is_reinstalled_by_name(monkeypatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(reinstall, "CLONE", tmp_path)
    monkeypatch.setattr(reinstall, "distribution", missing)
    assert reinstall.reinstall_command().endswith(" hf_lowmem")


@built
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    driver, flags = tmp_path / "driver", ["-O1", "-g", "-std=gnu11", "-fopenmp", "-DNO_CLONES"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += [f"-DPART_COLUMNS={', '.join(CPU_PART)}", f"-DSCALAR_COLUMNS={', '.join(SCALARS)}"]
    source = ROOT / "tests" / "support" / "native_driver.c"
    subprocess.run(["gcc", *flags, str(source), "-o", str(driver), "-lm"], check=True)
    done = subprocess.run([str(driver)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 300


@pytest.mark.slow
def test_the_package_installs_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CC": "/no/compiler"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf_lowmem" / "kernels" / "cpu" / "library.py").is_file()
    assert not list(tmp_path.rglob("*.so"))
