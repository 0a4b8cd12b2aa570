"""The memory planner: bytes of optimizer state from its declarations, and tables for people."""

from hf_lowmem.planner.compare import Comparison
from hf_lowmem.planner.explain import Explanation, Row, explain_adamw, explain_plan

__all__ = ["Comparison", "Explanation", "Row", "explain_adamw", "explain_plan"]
