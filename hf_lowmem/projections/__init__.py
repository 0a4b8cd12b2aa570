"""The spaces that moments live in."""

from hf_lowmem.projections.low_rank import LowRank
from hf_lowmem.projections.schedule import Schedule
from hf_lowmem.projections.tucker import Tucker

__all__ = ["LowRank", "Schedule", "Tucker"]
