"""How many tokens a model reads at once: what its config says, or what a scaled rotation stretches that to."""

from collections.abc import Mapping
from typing import Any

from hooks.whole import whole

NO_LIMIT = 1 << 30
STRETCHED = ("yarn", "longrope", "llama3", "linear", "dynamic")  # kinds of rotation that reach further by a factor


def context_of(config: Any, given: Any = None) -> int:
    """The longest prompt, new tokens included.

    With a rotation of a kind in `STRETCHED` it is factor · original_max_position_embeddings where that is more than
    max_position_embeddings, which some configs leave at the length before stretching (YaRN on the cards of Qwen2.5);
    where a config has no original length, its max_position_embeddings is taken for it.

    Args:
        given: what the user says instead.

    Raises:
        UserError: what is given is no number of tokens.
    """
    if given is not None:
        return whole(given, "context", least=1)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return NO_LIMIT
    return max([int(limit), *(_reach(rotation, int(limit)) for rotation in _rotations(config))])


def _rotations(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of the rotation; some models have one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(name in found for name in ("rope_type", "type")):
        return [found]
    return [part for part in found.values() if isinstance(part, Mapping)]


def _reach(rotation: Mapping[str, Any], limit: int) -> int:
    kind, factor = rotation.get("rope_type", rotation.get("type")), rotation.get("factor")
    if kind not in STRETCHED or not factor:
        return limit
    return int(factor * (rotation.get("original_max_position_embeddings") or limit))
