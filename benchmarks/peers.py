"""The optimizers of other packages with the settings of their authors, and ours by name."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # prefers the package in this tree to an installed one

import hf_lowmem  # noqa: E402

BASELINE = "adamw_fused"
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package, whose name on PyPI is `distribution`."""

    title: str
    distribution: str
    build: Callable[[Any], torch.optim.Optimizer]

    @property
    def installed(self) -> bool:
        return version_of(self.distribution) is not None


def version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def adamw_fused(model: Any) -> torch.optim.Optimizer:
    capturable = model.device.type == "cuda"  # for a CUDA graph; it does not change the fused step
    return torch.optim.AdamW(model.parameters(), **ADAM, fused=True, capturable=capturable)


def bnb_adamw8bit(model: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), **ADAM)


def bnb_paged_adamw8bit(model: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(model.parameters(), **ADAM)


def torchao_adamw8bit(model: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), **ADAM)


def torchao_adamw4bit(model: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW4bit

    return AdamW4bit(model.parameters(), **ADAM)


def gefen_x(model: Any) -> torch.optim.Optimizer:
    from gefen import Gefen

    return Gefen(model.named_parameters(), **ADAM)


def flashoptim(model: Any) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(model.parameters(), **ADAM)


def adam_mini(model: Any) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    config = model.config
    heads = {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
    return Adam_mini(model.named_parameters(), **ADAM, dim=config.hidden_size, **heads)


def galore(model: Any) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    settings = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(low_rank_groups(model, settings), **ADAM, no_deprecation_warning=True)


def apollo(model: Any) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    settings = {"proj": "random", "scale_type": "channel", "scale": 1, "update_proj_gap": 200, "proj_type": "std"}
    return APOLLOAdamW(low_rank_groups(model, settings), **ADAM)


def adv_optm_smmf(model: Any) -> torch.optim.Optimizer:
    """Return an AdamW that keeps its moments as SMMF does; SMMF's authors have no package."""
    from adv_optm import AdamW_adv

    return AdamW_adv(model.parameters(), **ADAM, state_precision="factored")


def pytorch_optimizer_fadam(model: Any) -> torch.optim.Optimizer:
    """Return a port of FAdam, whose author has published no code."""
    from pytorch_optimizer import FAdam

    return FAdam(model.parameters(), **ADAM)


def low_rank_groups(model: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return groups that project the body's linear layers to a quarter of their smaller side, as COAP does."""
    by_rank: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            by_rank[min(module.weight.shape) // 4].append(module.weight)
    projected = {id(weight) for weights in by_rank.values() for weight in weights}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in projected]
    return [{"params": rest}, *({"params": weights, "rank": rank, **settings} for rank, weights in by_rank.items())]


PEERS: dict[str, Peer] = {
    BASELINE: Peer("torch AdamW, fused", "torch", adamw_fused),
    "adamw_foreach": Peer(
        "torch AdamW, foreach", "torch", lambda model: torch.optim.AdamW(model.parameters(), **ADAM, foreach=True)
    ),
    "bnb_adamw8bit": Peer("bitsandbytes AdamW8bit", "bitsandbytes", bnb_adamw8bit),
    "bnb_paged_adamw8bit": Peer("bitsandbytes PagedAdamW8bit", "bitsandbytes", bnb_paged_adamw8bit),
    "torchao_adamw8bit": Peer("torchao AdamW8bit", "torchao", torchao_adamw8bit),
    "torchao_adamw4bit": Peer("torchao AdamW4bit", "torchao", torchao_adamw4bit),
    "gefen_x": Peer("gefen-x Gefen", "gefen-x", gefen_x),
    "flashoptim": Peer("flashoptim FlashAdamW", "flashoptim", flashoptim),
    "authors_adam_mini": Peer("adam-mini Adam_mini", "adam-mini", adam_mini),
    "galore": Peer("galore-torch GaLoreAdamW", "galore-torch", galore),
    "apollo": Peer("apollo-torch APOLLOAdamW", "apollo-torch", apollo),
    "adv_optm_smmf": Peer("adv_optm AdamW_adv, SMMF's state", "adv_optm", adv_optm_smmf),
    "pytorch_optimizer_fadam": Peer("pytorch_optimizer FAdam", "pytorch_optimizer", pytorch_optimizer_fadam),
}


def build(name: str, model: Any) -> torch.optim.Optimizer:
    """Return the optimizer of one row: a peer, or an optim name of ours followed by a space and its optim_args."""
    if peer := PEERS.get(name):
        return peer.build(model)
    optim, _, optim_args = name.partition(" ")
    return hf_lowmem.build_optimizer(model, optim, **ADAM, optim_args=optim_args or None)
