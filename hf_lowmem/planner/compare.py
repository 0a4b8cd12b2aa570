"""The comparison of all optim names on one model, by the bytes that each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowmem.planner.explain import Explanation
from hf_lowmem.planner.tables import change, table
from hf_lowmem.sizes import readable


@dataclass(frozen=True)
class Comparison:
    """The explanations of one model by optim name. It prints as a table of at most 100 columns, the smallest first."""

    explanations: Mapping[str, Explanation]

    def to_dict(self) -> dict[str, Any]:
        """Return the totals by name, ready for JSON."""
        return {name: explanation.totals() for name, explanation in self.explanations.items()}

    def __str__(self) -> str:
        ordered = sorted(self.explanations.items(), key=lambda item: item[1].nbytes)
        lines = [
            (
                name,
                f"{found.bytes_per_param:.3f}",
                readable(found.nbytes),
                change(found.nbytes, found.adamw_nbytes),
                readable(found.total_bytes),
                change(found.total_bytes, found.adamw_total_bytes),
            )
            for name, found in ordered
        ]
        head = ("optim", "bytes/param", "state", "to AdamW's", "all", "to AdamW's")
        one = ordered[0][1]
        return "\n".join(
            [
                f"{one.numel:,} trainable parameters in {one.dtypes}: the weights take {readable(one.weight_bytes)} "
                f"and the gradients {readable(one.gradient_bytes)}.",
                *(
                    [f"All bytes are those of each of {one.ranks} processes, among which FSDP2 divides the weights."]
                    if one.ranks > 1
                    else []
                ),
                "State is that of the optimizer; all is weights, gradients and state, without activations.",
                "",
                *table(head, lines),
            ]
        )
