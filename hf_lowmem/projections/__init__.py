"""The spaces that moments live in."""

from hf_lowmem.projections.eigenbasis import Eigenbasis
from hf_lowmem.projections.low_rank import LowRank
from hf_lowmem.projections.schedule import Schedule
from hf_lowmem.projections.tucker import Tucker

__all__ = ["Eigenbasis", "LowRank", "Schedule", "Tucker"]
