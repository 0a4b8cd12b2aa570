"""Bytes from declared specs, and the tables a person reads."""

from hf_lowmem.planner.explain import Explanation, Row, explain_plan

__all__ = ["Explanation", "Row", "explain_plan"]
