"""The findings of a check, stored with the set's files: in a native set's manifest, else in `calibration.json`."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hooks.errors import CheckpointError, UserError
from hooks.files import is_there, read_json, write_json
from hooks.formats import OPEN, native
from hooks.sites import SiteSpec

FILE = "calibration.json"
Verdict = Literal["clear", "too close", "none is good"]
"""Whether the measured convention may be used; see `hooks.check.verdict.decide`."""


_T = TypeVar("_T")
_Several = Annotated[tuple[_T, ...], Field(strict=False)]  # JSON has lists


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerFinding(_Strict):
    """One layer at the set's best candidate.

    Attributes:
        fvu: sum |x − x_hat|² / sum |x − mean x|² over all tokens; None where x does not vary.
        fvu_without_sinks: the same without tokens of more than ten times the median norm. The verdict uses this one.
        fvu_normed: the same with x / rms(x) in place of x.
        loss: mean of (x − x_hat)² per entry, the unit of `stored_loss`, the metadata's `final_rec_loss`.
        l0: mean number of active features per token.
        avoidable: the part of the FVU that a refit of the decoder would remove; None where it was not needed.
        winner: the layer's own best candidate, as `read -> write, encoder`.
        ok: the set's best candidate is this layer's own best, or as good as it, and its FVU is good.
    """

    layer: int
    read: str
    write: str
    encoder: str
    fvu: float | None
    fvu_without_sinks: float | None
    fvu_normed: float | None
    loss: float
    stored_loss: float | None = None
    l0: float
    avoidable: float | None = None
    winner: str
    ok: bool


class Candidate(_Strict):
    """One candidate (read site, write site, encoder) over the whole set, without sinks.

    Attributes:
        fvu: the median over the layers.
        avoidable: the mean over the layers for which it was measured.
        separation: standard errors by which its avoidable error is above the winner's; None for the winner itself and
            where it was not measured.
    """

    read: str
    write: str
    encoder: str
    decoder: int = 0
    fvu: float
    avoidable: float | None = None
    separation: float | None = None

    @field_validator("read", "write")
    @classmethod
    def _is_a_site(cls, text: str) -> str:
        SiteSpec.parse(text)
        return text

    def __str__(self) -> str:
        return f"{self.read} -> {self.write}, {self.encoder} encoder"


class CurvePoint(_Strict):
    """FVU and L0 when TopK keeps k features; k None: plain ReLU."""

    k: int | None
    fvu: float
    l0: float


class Selection(_Strict):
    """How the set selects features, from evidence other than the FVU.

    Attributes:
        activation: name of the selection rule; None: undetermined.
        k: None: the rule has none, or it is undetermined.
        measured_with: the selection rule that the measurement used, in words.
    """

    activation: str | None
    k: int | None
    source: Literal["stored", "metadata", "given", "undetermined"]
    measured_with: str
    reason: str
    curve: _Several[CurvePoint] = ()


class DecoderFinding(_Strict):
    """The best candidate of one of several decoders."""

    best: Candidate
    verdict: Verdict
    margin: float | None


class Findings(_Strict):
    """What was measured, on which text and model, and the verdict.

    Attributes:
        other_model: there are signs that the set was trained on another model; `notes` begin with them.
        margin: FVU of the best other candidate minus FVU of the winner. Negative where the other one has the lower FVU
            and was excluded because of its avoidable error. None where there is no other.
        ranking: the best candidates, the winner first.
        decoders: one entry per decoder where the files hold several.
        notes: further remarks, in sentences.
    """

    version: Annotated[int, Field(ge=1, le=1)] = 1  # a Literal would take true for 1
    verdict: Verdict
    other_model: bool
    best: Candidate
    margin: float | None
    ranking: _Several[Candidate]
    layers: _Several[LayerFinding]
    selection: Selection
    decoders: _Several[DecoderFinding] = ()
    notes: _Several[str] = ()
    tokens: int = Field(ge=1)
    sinks: int = Field(ge=0)
    text: str
    model: str
    fingerprint: str
    date: str
    program: str

    @property
    def usable(self) -> bool:
        """Whether the measured convention may be used."""
        return self.verdict == "clear" and not self.other_model

    @property
    def read(self) -> SiteSpec:
        """The measured read site."""
        return SiteSpec.parse(self.best.read)

    @property
    def write(self) -> SiteSpec:
        """The measured write site."""
        return SiteSpec.parse(self.best.write)


def read_findings(root: str | Path) -> Findings | None:
    """The findings that an earlier check wrote about a set; None where there are none.

    Raises:
        CheckpointError: they are damaged, or of another version.
    """
    root = Path(root)
    if native.matches(root):
        stored, path = native.read_manifest(root).calibration, root / native.MANIFEST
        return None if stored is None else _parsed(stored, path)
    path = root / FILE
    return _parsed(read_json(path), path) if is_there(path) else None


def _parsed(stored: Any, path: Path) -> Findings:
    try:
        return Findings.model_validate(stored)
    except (ValidationError, UserError) as error:
        found = native.faults(error, "findings") if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(
            "the findings of an earlier check cannot be read",
            expected="what `circuits check --save` of this version writes",
            found=found,
            where=str(path),
            repair="check the set again with --save" if path.name == FILE else "remove `calibration` from the manifest",
        ) from None


def save_findings(root: str | Path, findings: Findings) -> Path:
    """Write findings to the file from which `read_findings` reads them, and return that file.

    In a native set whose sites were unknown or assumed, the measured sites are written too, if the verdict is clear and
    there are no signs of another model.

    Raises:
        OutputError: the folder cannot be written to.
    """
    root, content = Path(root), findings.model_dump(mode="json")
    if not native.matches(root):
        write_json(root / FILE, content)
        return root / FILE
    manifest = native.read_manifest(root)
    unsure = manifest.sites_source in OPEN
    sites: dict[str, Any] = {}
    if findings.usable and (unsure or manifest.read is None or manifest.write is None):
        sites = {"read": findings.best.read, "write": findings.best.write, "sites_source": "calibrated"}
    changed = native.Manifest.model_validate(manifest.model_dump() | {"calibration": content} | sites)
    write_json(root / native.MANIFEST, changed.model_dump(mode="json", exclude_none=True))
    return root / native.MANIFEST
