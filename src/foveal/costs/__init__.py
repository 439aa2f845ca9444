"""What a model costs, counted from its config. Imports no torch."""

from foveal.costs.attention import MLAForm, causal_pairs, cheapest_mla_form, mla_macs, selected_pairs
from foveal.costs.devices import Device, find_device
from foveal.costs.plan import Plan, Request, make_plan
from foveal.costs.variants import apply_variant

__all__ = [
    "Device",
    "MLAForm",
    "Plan",
    "Request",
    "apply_variant",
    "causal_pairs",
    "cheapest_mla_form",
    "find_device",
    "make_plan",
    "mla_macs",
    "selected_pairs",
]
