"""How checkpoints spell the names of the tensors. The canonical spelling is diffusers', which is the model's own.

A layout is a table of (theirs, ours) endings of module names.
"""

from __future__ import annotations

OLD_ATTENTION = (
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out.0"),
)
"""diffusers before 0.15, as sd-vae-ft-mse on the hub."""


def canonical(name: str) -> str:
    """`decoder.mid_block.attentions.0.query.weight` -> `decoder.mid_block.attentions.0.to_q.weight`."""
    module, _, parameter = name.rpartition(".")
    for theirs, ours in OLD_ATTENTION:
        if ".attentions." in module and module.endswith("." + theirs):
            return f"{module.removesuffix(theirs)}{ours}.{parameter}"
    return name
