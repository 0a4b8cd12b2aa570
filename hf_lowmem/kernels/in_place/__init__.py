"""Rules with sums or products over whole weights, in plain torch: in tiles, and with products between them."""

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.in_place.adafactor import ADAFACTOR
from hf_lowmem.kernels.in_place.fadam import FADAM
from hf_lowmem.kernels.in_place.h_fac import H_FAC
from hf_lowmem.kernels.in_place.micro_adam import MICRO_ADAM
from hf_lowmem.kernels.in_place.smmf import SMMF
from hf_lowmem.kernels.in_place.soap import SOAP
from hf_lowmem.kernels.in_place.subspace import SUBSPACE_RULE, is_in_subspace, subspace_adamw
from hf_lowmem.kernels.passes import InPasses


class InPlace(InPasses):
    """Steps of the rules that are not elementwise, and of `transformers_adamw` in a subspace.

    A product with a basis needs one temporary of the weight's size.
    """

    def covers(self, rule: str, step: ParamStep) -> bool:
        return is_in_subspace(step) if rule == SUBSPACE_RULE else super().covers(rule, step)

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        if bucket.rule == SUBSPACE_RULE:
            subspace_adamw(bucket, hyper)
        else:
            super().step(bucket, hyper)


IN_PLACE = InPlace(
    "in_place",
    {
        "adafactor": ADAFACTOR,
        "soap": SOAP,
        "smmf": SMMF,
        "micro_adam": MICRO_ADAM,
        "fadam": FADAM,
        "h_fac": H_FAC,
    },
)
