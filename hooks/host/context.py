"""How many tokens a model can read: what its config says, or more if its rotary embedding is scaled."""

from collections.abc import Mapping
from typing import Any

from hooks.whole import whole

NO_LIMIT = 1 << 30
STRETCHED = ("yarn", "longrope", "llama3", "linear", "dynamic")  # kinds of rotation that extend the context by a factor


def context_of(config: Any, given: Any = None) -> int:
    """The longest prompt, new tokens included.

    With a rotation of a kind in `STRETCHED` it is factor · original_max_position_embeddings, if that is more than
    max_position_embeddings. Some configs state the length before scaling in max_position_embeddings (YaRN on the cards
    of Qwen2.5). If a config has no original length, max_position_embeddings is used as the original length.

    Args:
        given: the user's own number, used instead.

    Raises:
        UserError: `given` is no number of tokens.
    """
    if given is not None:
        return whole(given, "context", least=1)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return NO_LIMIT
    return max([int(limit), *(_reach(rotation, int(limit)) for rotation in _rotations(config))])


def _rotations(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of each rotation; some models have one rotation for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(name in found for name in ("rope_type", "type")):
        return [found]
    return [part for part in found.values() if isinstance(part, Mapping)]


def _reach(rotation: Mapping[str, Any], limit: int) -> int:
    kind, factor = rotation.get("rope_type", rotation.get("type")), rotation.get("factor")
    if kind not in STRETCHED or not factor:
        return limit
    return int(factor * (rotation.get("original_max_position_embeddings") or limit))
