"""The pictures of a run, a comparison and the demo. Plain data in, a matplotlib Figure out; no pyplot, no display.

Readers with any colour vision can tell the colours apart, and no meaning depends on colour alone: lines are labelled,
and cells show their number if it fits. A file per group of pictures; ``style`` holds what they share.
"""

from coterie.report.plots.assignment import Panel, assigned_experts, held_experts, held_together, used_experts
from coterie.report.plots.clusters import client_distances, demo_picture, dendrogram, silhouettes
from coterie.report.plots.cross import cross_map
from coterie.report.plots.curves import Curve, lines_by_round
from coterie.report.plots.experts import expert_usage, experts_by_layer
from coterie.report.plots.quotas import adapter_use, quota_map
from coterie.report.plots.style import INK, LINE, MUTED, PALETTE, SURFACE, Picture, natural, png, svg

__all__ = [
    "INK",
    "LINE",
    "MUTED",
    "PALETTE",
    "SURFACE",
    "Curve",
    "Panel",
    "Picture",
    "adapter_use",
    "assigned_experts",
    "client_distances",
    "cross_map",
    "demo_picture",
    "dendrogram",
    "expert_usage",
    "experts_by_layer",
    "held_experts",
    "held_together",
    "lines_by_round",
    "natural",
    "png",
    "quota_map",
    "silhouettes",
    "svg",
    "used_experts",
]
