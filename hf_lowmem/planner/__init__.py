"""Bytes from declared specs, and the tables a person reads."""

from hf_lowmem.planner.compare import Comparison
from hf_lowmem.planner.explain import Explanation, Row, explain_adamw, explain_plan

__all__ = ["Comparison", "Explanation", "Row", "explain_adamw", "explain_plan"]
