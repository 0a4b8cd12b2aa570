"""Imports point one way: a module may import its own layer and those after it."""

from __future__ import annotations

import ast
from pathlib import Path

import hf_lowmem

PACKAGE = Path(hf_lowmem.__file__).parent
LAYERS = [
    {"__init__", "__main__", "cli", "convert", "demo", "doctor", "snr_command", "snr_report"},
    {"trainer"},
    {"planner"},
    {"algorithms"},
    {"param_groups"},
    {"snr"},
    {"rules", "roles"},
    {"optimizer"},
    {"stateful_optimizer"},
    {"planned_optimizer"},
    {"buckets", "checkpoint", "clipping", "gathering", "release", "stepping", "units"},
    {"adamw_state", "checks", "option_help", "options", "param_layouts", "step_checks"},
    {"kernels", "shards"},
    {"projections"},
    {"update_rules", "moments", "codecs", "rounding", "placement", "replicas"},
    {"state", "scratch", "names", "dense", "sharding", "state_place"},
    {"log", "sizes"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
EDGE_ONLY = {"transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"}
EDGE = DEPTH["trainer"]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the import in full"
            below = [f"hf_lowmem.{alias.name}" for alias in node.names]
            found += below if node.module == "hf_lowmem" else [str(node.module)]
    return found


def layer_of(module: str) -> int:
    return DEPTH[module.split(".")[1] if "." in module else "__init__"]


def test_every_module_has_a_layer() -> None:
    top = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert {name for name in top if name != "py"} <= set(DEPTH)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = DEPTH[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
        for name in imports(path):
            if name.split(".")[0] == "hf_lowmem" and own > 0 and layer_of(name) < own:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
            if name.split(".")[0] in EDGE_ONLY and own > EDGE:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_one_file_touches_transformers_internals() -> None:
    internals = ("_OPTIMIZER_HANDLERS", "_value2member_map_", "get_last_checkpoint =", "Trainer.train =")
    touching = [path.name for path in PACKAGE.rglob("*.py") if any(word in path.read_text() for word in internals)]
    assert touching == ["registration.py"]
