"""The role of every parameter of a model: what it does, which axes are fan_in and fan_out, and its fused parts."""

from hf_lowmem.names import canonical_name
from hf_lowmem.roles.assign import assign_roles
from hf_lowmem.roles.fused_layouts import FusedPart
from hf_lowmem.roles.param_role import ROLES, ParamRole

__all__ = ["ROLES", "FusedPart", "ParamRole", "assign_roles", "canonical_name"]
