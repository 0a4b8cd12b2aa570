"""The representations of a moment: per entry, group, or row and column; rank-1 factors; a window of gradients."""

from hf_lowmem.moments.full import Full
from hf_lowmem.moments.group_mean import GroupMean, Segment, whole
from hf_lowmem.moments.rank_one import RankOne
from hf_lowmem.moments.row_col_mean import RowColMean
from hf_lowmem.moments.top_k_window import TopKWindow

__all__ = ["Full", "GroupMean", "RankOne", "RowColMean", "Segment", "TopKWindow", "whole"]
