"""The algorithms, one file per paper: its options, its equations and source, the optimizer class and the recipe.

>>> hf_lowmem.algorithms.RECIPES["slim_adamw"].optimizer_cls.__name__
'SlimAdamW'
"""

from hf_lowmem.algorithms.adalayer import Adalayer, AdalayerRecipe
from hf_lowmem.algorithms.adam_mini import AdamMini, AdamMiniRecipe
from hf_lowmem.algorithms.adamw import LowMemAdamW, LowMemAdamWRecipe
from hf_lowmem.algorithms.coap import CoapAdafactor, CoapAdafactorRecipe, CoapAdamW, CoapAdamWRecipe
from hf_lowmem.algorithms.factored_adamw import FactoredAdamW, FactoredAdamWRecipe
from hf_lowmem.algorithms.fadam import FAdam, FAdamRecipe
from hf_lowmem.algorithms.h_fac import HFac, HFacRecipe
from hf_lowmem.algorithms.micro_adam import MicroAdam, MicroAdamRecipe
from hf_lowmem.algorithms.signum import Signum, SignumRecipe
from hf_lowmem.algorithms.slim_adam import SlimAdamRecipe, SlimAdamW
from hf_lowmem.algorithms.smmf import Smmf, SmmfRecipe
from hf_lowmem.algorithms.soap import Soap, SoapRecipe
from hf_lowmem.param_groups import Recipe

RECIPES: dict[str, type[Recipe]] = {
    recipe.optimizer_cls.algorithm: recipe
    for recipe in (
        LowMemAdamWRecipe,
        FactoredAdamWRecipe,
        SlimAdamRecipe,
        AdamMiniRecipe,
        AdalayerRecipe,
        SignumRecipe,
        CoapAdamWRecipe,
        CoapAdafactorRecipe,
        SoapRecipe,
        SmmfRecipe,
        MicroAdamRecipe,
        FAdamRecipe,
        HFacRecipe,
    )
}

__all__ = [
    "Adalayer",
    "AdamMini",
    "CoapAdafactor",
    "CoapAdamW",
    "FAdam",
    "FactoredAdamW",
    "HFac",
    "LowMemAdamW",
    "MicroAdam",
    "RECIPES",
    "Signum",
    "SlimAdamW",
    "Smmf",
    "Soap",
]
