"""The projections: the spaces that moments are kept in."""

from hf_lowmem.projections.basis import BasisOptions
from hf_lowmem.projections.eigenbasis import Eigenbasis
from hf_lowmem.projections.low_rank import LowRank
from hf_lowmem.projections.tucker import Tucker

__all__ = ["BasisOptions", "Eigenbasis", "LowRank", "Tucker"]
