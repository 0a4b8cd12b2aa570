"""How a moment is represented."""

from hf_lowmem.moments.full import Full
from hf_lowmem.moments.group_mean import GroupMean, Segment, whole

__all__ = ["Full", "GroupMean", "Segment", "whole"]
