"""What is trained: sites, sizes, tokens, and every number of the optimisation."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hooks.choices import TRAIN_TOKENS
from hooks.errors import UserError
from hooks.sites import SiteSpec
from hooks.whole import whole

EXPANSION, ACTIVE = 2.4, 0.12  # of the published set: features per dimension, and the share of them that TopK keeps
RATE, RATE_FEATURES = 1.5e-3, 4096  # the learning rate, and up to how many features; it falls with their square root


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a set besides the model and the text.

    The form is the published one: LayerNorm, Linear, TopK, ReLU, Linear.

    Attributes:
        d_features: features of each layer.
        k: how many of them TopK keeps at a token.
        read, write: sites relative to a layer.
        tokens: how many tokens of text a layer is trained on; a shorter text is read again, in another order.
        batch: tokens of one step.
        learning_rate: of AdamW, at its highest; it rises over `warm_up` steps and falls to 0 as a cosine.
        clip: the largest norm of a step's gradient.
        auxiliary: the weight of the loss that revives dead features (AuxK, Gao et al., arXiv:2406.04093).
        dead_after: tokens at which a feature was inactive, one after the other, until it counts as dead.
        context: tokens of the windows that the text is cut into.
        chunk: tokens whose activations are held, and shuffled, at a time.
        seed: where chance starts.
    """

    d_features: int
    k: int
    read: str = "resid_pre"
    write: str = "resid_pre"
    tokens: int = TRAIN_TOKENS
    batch: int = 1024
    learning_rate: float = RATE
    warm_up: int = 100
    clip: float = 1.0
    auxiliary: float = 1 / 32
    dead_after: int = 100_000
    context: int = 128
    chunk: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int:
                least = 0 if field.name in ("warm_up", "seed") else 1
                whole(getattr(self, field.name), field.name, least=least)
        for name in ("learning_rate", "clip", "auxiliary"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is not a number of at least 0", found=repr(value))
        if self.k > self.d_features:
            raise UserError("TopK cannot keep more features than there are", found=f"{self.k} of {self.d_features}")
        if self.batch > self.chunk:
            raise UserError("a batch is larger than a chunk", found=f"{self.batch} of {self.chunk} tokens")
        SiteSpec.parse(self.read)
        SiteSpec.parse(self.write)

    @classmethod
    def sized(
        cls,
        d_model: int,
        *,
        d_features: int | None = None,
        expansion: float | None = None,
        k: int | None = None,
        **rest: Any,
    ) -> "Recipe":
        """A recipe for a width: 2.4 features per dimension, 12 % of them active, unless told otherwise.

        Raises:
            UserError: `d_features` and `expansion` are both given, or a number is out of range.
        """
        if d_features is not None and expansion is not None:
            raise UserError("features and an expansion contradict each other", repair="give one of them")
        if expansion is not None and not (math.isfinite(expansion) and expansion > 0):
            raise UserError("the expansion is not a number above 0", found=repr(expansion))
        size = round((expansion or EXPANSION) * d_model) if d_features is None else whole(d_features, "d_features")
        kept = max(1, int(ACTIVE * size)) if k is None else k
        rate = {"learning_rate": RATE * min(1.0, math.sqrt(RATE_FEATURES / max(1, size)))}
        return cls(d_features=size, k=kept, **(rate | rest))

    def facts(self) -> Mapping[str, Any]:
        """All of it, as JSON holds it."""
        return asdict(self)

    def rate(self, seen: int, step: int) -> float:
        """The learning rate of a step.

        Args:
            seen: tokens before it.
            step: steps before it.
        """
        rise = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        return self.learning_rate * rise * (1 + math.cos(math.pi * min(1.0, seen / self.tokens))) / 2
