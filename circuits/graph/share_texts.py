"""How much of a target passes through features, errors and biases, in words."""

from collections.abc import Mapping
from typing import Any

MOST = 0.5  # above this share of a site, errors carry most of the target


def least_site(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The write site at which the smallest share passes through features; None for a graph that does not know."""
    sites = [site for site in meta.get("sites", ()) if site["share"]["features"] is not None]
    return min(sites, key=lambda site: site["share"]["features"], default=None)


def carried(meta: Mapping[str, Any]) -> str | None:
    """One sentence for a caption."""
    site = least_site(meta)
    if site is None:
        return None
    share = site["share"]
    what = "difference" if "counterfactual" in meta else "target"
    parts = f"features carry {share['features']:.0%} and errors {share['errors']:.0%}"
    return f"of the {what}, {parts} at layer {site['layer']}, where features carry least"


def warning(meta: Mapping[str, Any]) -> str | None:
    """What to say of a graph in which errors carry most at some site."""
    layers = [site["layer"] for site in meta.get("sites", ()) if (site["share"]["errors"] or 0) > MOST]
    if not layers:
        return None
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    return (
        f"errors carry most of what is explained at {where}: features say little about this prompt there. "
        "A set that is trained on more text of this kind, with more features or a larger k, may explain more"
    )
