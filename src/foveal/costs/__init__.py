"""What a model costs, counted from its config. Imports no torch."""

from foveal.costs.attention import MLAForm, causal_pairs, cheapest_mla_form, mla_macs, selected_pairs

__all__ = ["MLAForm", "causal_pairs", "cheapest_mla_form", "mla_macs", "selected_pairs"]
