"""Whether a graph belongs to a model."""

from circuits.graph.graph import Graph
from hooks.errors import UserError
from hooks.model import HookedModel


def check_same(model: HookedModel, graph: Graph) -> None:
    """Refuse a graph of another model.

    Raises:
        UserError: the fingerprints differ.
    """
    if graph.meta.get("fingerprint") != model.fingerprint:
        raise UserError(
            "the graph belongs to another model or set of transcoders",
            expected=f"{graph.meta.get('model')} with {graph.meta.get('transcoders')}",
            found=f"{model.name} with {model.store.name}",
        )
