"""The representations of a moment: one number per entry, per group, or per row and column; a window of gradients."""
"""The representations of a moment: one number per entry, per group, or per row and column, and factors."""

from hf_lowmem.moments.full import Full
from hf_lowmem.moments.group_mean import GroupMean, Segment, whole
from hf_lowmem.moments.rank_one import RankOne
from hf_lowmem.moments.row_col_mean import RowColMean
from hf_lowmem.moments.top_k_window import TopKWindow

__all__ = ["Full", "GroupMean", "RowColMean", "Segment", "TopKWindow", "whole"]
__all__ = ["Full", "GroupMean", "RankOne", "RowColMean", "Segment", "whole"]
