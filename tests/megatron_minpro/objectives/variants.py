"""Every objective, and every option that changes the form of its formula: name -> (objective, options)."""

from __future__ import annotations

from megatron_minpro.objectives import OBJECTIVES, Objective, make_objective

REQUIRED: dict[str, dict[str, object]] = {"scaled_cispo": {"scale": 0.5}}

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, REQUIRED.get(name, {})) for name in OBJECTIVES.known},
    "minpro_lower_bound": ("minpro", {"clip_low": 0.5, "clip_high": 1.0}),
    "grpo_dual_clip": ("grpo", {"dual_clip": 2.0}),
    "m2po_official": ("m2po", {"rule": "official"}),
    "m2po_second_moment_all": ("m2po", {"rule": "second_moment_all"}),
    "ctpo_constant_bounds": ("ctpo", {"power": 0.0}),
    "topr_sequence_mean": ("topr", {"level": "sequence_mean", "positive_low": 0.2, "negative_low": 0.1}),
    "topr_token": ("topr", {"level": "token", "positive_low": 0.2, "negative_low": 0.1}),
    "cppo_small_budget": ("cppo", {"delta": 0.05, "delta_b": 0.01, "w_min": 0.5}),
    "sat_median": ("sat", {"quantile": 0.5, "clip_low": 1.0, "clip_high": 2.0}),
    "estr_strict": ("estr", {"tau": 0.3}),
    "pnpo_wide": ("pnpo", {"clip_low": 0.05, "clip_high": 0.2}),
    "ema_kpo_wide": ("ema_kpo", {"noise_ratio": 0.25, "clip_low": 0.5, "clip_high": 1.0}),
    "drpo_small_epsilon": ("drpo", {"epsilon": 0.2}),
    "masked_is_narrow": ("masked_is", {"low": 0.8, "high": 1.3}),
    "prefix_filter_third": ("prefix_filter", {"fraction": 0.3}),
}


def make(variant: str) -> Objective:
    name, options = VARIANTS[variant]
    return make_objective(name, **options)
