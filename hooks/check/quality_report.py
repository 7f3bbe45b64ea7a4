"""The results of `quality_figures` for a set of transcoders, per layer and per group of replaced sites."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hooks.choices import REPORTS
from hooks.errors import OutputError
from hooks.files import replacing, write_json

_SUMMED = ("dead", "always_on", "features")
_NOTHING_LOST = 1e-6  # nats; an ablation that costs less gives no score


@dataclass(frozen=True)
class LayerQuality:
    """How well one transcoder reconstructs its write site.

    Attributes:
        fvu, fvu_calm, fvu_normed: over all tokens; without sinks; of x / rms(x). None without variance.
        cosine, norm_ratio: means over tokens of cos(x, x̂) and of |x̂| / |x|.
        l0: mean number of active features per token.
        dead, always_on: number of features that are active at no token, and at every token, of this text.
        loss: mean squared error per entry. `stored_loss` is `final_rec_loss` in the files; None if they have none.
        sinks: how many tokens have more than `hooks.passes.recording.SINK` times the site's median norm.
    """

    layer: int
    fvu: float | None
    fvu_calm: float | None
    fvu_normed: float | None
    cosine: float
    norm_ratio: float | None
    l0: float
    dead: int
    always_on: int
    features: int
    loss: float
    stored_loss: float | None
    sinks: int


@dataclass(frozen=True)
class Prediction:
    """The model's predictions under a replacement.

    Attributes:
        ce: mean cross-entropy of the next token, nats per token, over the tokens that have one.
        kl: mean KL(clean || replaced), nats, over all tokens.
        top1_agreement: share of all tokens whose most likely next token is unchanged.
    """

    ce: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Replacement:
    """Results of replacing some sites together: by their reconstructions without the error (`swapped`), and by their
    means over the text (`ablated`)."""

    layers: tuple[int, ...]
    swapped: Prediction
    ablated: Prediction
    clean_ce: float

    @property
    def delta_ce(self) -> float:
        """The cost of swapping, in nats per token."""
        return self.swapped.ce - self.clean_ce

    @property
    def ce_score(self) -> float | None:
        """(CE_ablated − CE_swapped) / (CE_ablated − CE_clean): 1 is as good as the plain model, 0 as bad as the mean.
        None where ablation costs nothing."""
        lost = self.ablated.ce - self.clean_ce
        return (self.ablated.ce - self.swapped.ce) / lost if lost > _NOTHING_LOST else None

    @property
    def kl_score(self) -> float | None:
        """(KL_ablated − KL_swapped) / KL_ablated."""
        lost = self.ablated.kl
        return (lost - self.swapped.kl) / lost if lost > _NOTHING_LOST else None


@dataclass(frozen=True)
class QualityReport:
    """Every layer's reconstruction, and the effect of replacing one, eight and all sites.

    Attributes:
        tokens, predicted: number of tokens of the text, and of those that have a next token.
        clean_ce: cross-entropy of the plain model.
        one: per layer, the result of replacing only that site.
        together: several sites at once, by name: `8 evenly spaced` where there are more, and `all`.
    """

    model: str
    transcoders: str
    tokens: int
    predicted: int
    clean_ce: float
    layers: tuple[LayerQuality, ...]
    one: Mapping[int, Replacement]
    together: Mapping[str, Replacement]

    @property
    def table(self) -> pd.DataFrame:
        """One row per layer, then one per group of layers swapped together.

        For a group, the numbers of dead, always-on and all features are sums over its layers, and its other columns
        about sites are means. Its columns about predictions are measured.
        """
        sites = pd.DataFrame([asdict(layer) for layer in self.layers])
        rows = [
            {"swapped": f"L{layer}", **_site_columns(sites[sites["layer"] == layer]), **_columns(replaced)}
            for layer, replaced in self.one.items()
        ]
        for name, replaced in self.together.items():
            here = sites[sites["layer"].isin(replaced.layers)]
            rows.append({"swapped": name, **_site_columns(here), **_columns(replaced)})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain values, for JSON."""
        facts = ("model", "transcoders", "tokens", "predicted", "clean_ce")
        return {
            **{name: getattr(self, name) for name in facts},
            "layers": [asdict(layer) | {"swap": _nested(self.one[layer.layer])} for layer in self.layers],
            "together": {name: _nested(replaced) for name, replaced in self.together.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write whole or not at all: JSON of everything, or the table as CSV or parquet, by the suffix.

        Raises:
            OutputError: the suffix is another one, the file cannot be written, or pyarrow is not installed.
        """
        path = Path(path)
        check_report_suffix(path)
        if path.suffix.lower() == ".json":
            write_json(path, self.to_dict())
            return
        with replacing(path) as temporary:
            if path.suffix.lower() == ".csv":
                self.table.to_csv(temporary, index=False)
                return
            try:
                self.table.to_parquet(temporary, index=False)
            except ImportError:
                raise OutputError("parquet needs pyarrow", repair="pip install 'qwen-circuits[parquet]'") from None


def check_report_suffix(path: Path) -> None:
    """Refuse a report that cannot be written, before anything is measured.

    Raises:
        OutputError: the suffix is none of csv, json and parquet.
    """
    if path.suffix.lower() not in REPORTS:
        raise OutputError(f"unknown table format {path.suffix!r}", expected=", ".join(REPORTS), where=str(path))


def _site_columns(sites: pd.DataFrame) -> dict[str, Any]:
    columns = sites.drop(columns=["layer"]).apply(pd.to_numeric)
    return {name: columns[name].sum() if name in _SUMMED else columns[name].mean() for name in columns}


def _columns(item: Replacement) -> dict[str, Any]:
    return {
        "ce": item.swapped.ce,
        "delta_ce": item.delta_ce,
        "ce_ablated": item.ablated.ce,
        "ce_score": item.ce_score,
        "kl": item.swapped.kl,
        "kl_ablated": item.ablated.kl,
        "kl_score": item.kl_score,
        "top1_agreement": item.swapped.top1_agreement,
        "top1_ablated": item.ablated.top1_agreement,
    }


def _nested(item: Replacement) -> dict[str, Any]:
    scores = {"delta_ce": item.delta_ce, "ce_score": item.ce_score, "kl_score": item.kl_score}
    return asdict(item) | {"layers": list(item.layers)} | scores
