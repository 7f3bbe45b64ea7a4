"""Whether a graph belongs to a model."""

from typing import Protocol, runtime_checkable

from circuits.graph.graph import Graph
from hooks.checkpoints import TranscoderStore
from hooks.errors import UserError


@runtime_checkable
class ModelWithSet(Protocol):
    """A model and its transcoders: the part of `HookedModel` that is needed here."""

    store: TranscoderStore

    @property
    def name(self) -> str:
        """The user's name for the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest that differs between models and between sets."""
        ...


def check_same(model: ModelWithSet, graph: Graph) -> None:
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
