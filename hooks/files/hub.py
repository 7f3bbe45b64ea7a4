"""Names of sets → folders: a local folder stays what it is, a hub id becomes a folder of the hub's cache.

Only the files that a known format opens are downloaded: the weights of the wanted layers, and the small files beside
them. An interrupted download continues where it stopped. Without a connection the cache is used, if it is complete.
"""

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled

from hooks.errors import CheckpointError, first_line
from hooks.files.documents import TEXT_LIMIT, read_json
from hooks.files.links import hub_snapshot, is_file, is_folder, is_there

_ID = re.compile(r"(?P<marked>hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(?:/[^/@]+)*)/?(?:@(?P<revision>[^@]+))?")
_WEIGHTS = re.compile(
    r"transcoder_L\d{1,6}\.pt|layer_?\d{1,6}\.safetensors|layer\d{1,6}\.sae\.pt|W_(enc|dec)_\d{1,6}\.safetensors"
    r"|sae(_weights)?\.safetensors|ae\.pt|params\.(npz|safetensors)|final\.safetensors"
)
_CONFIGS = frozenset(("manifest.json", "config.json", "cfg.json", "config.yaml", "config.yml", "hyperparams.json"))
_LAYER = re.compile(
    r"(?:^|[/_.-])(?:transcoder_L|layers?[._-]?|blocks\.|W_(?:enc|dec)_|L(?=\d{1,6}(?:R|M|A|TC)-))(\d{1,6})(?=\D)"
)


@dataclass(frozen=True)
class ResolvedSet:
    """The folder of a set, and where it came from.

    Attributes:
        repo: the hub repository; None for a folder outside the hub's cache.
        revision: the commit.
        notes: warnings: the cache was used instead of the hub, the repository lacks layers, the cache has extra files.
    """

    root: Path
    repo: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Wish:
    """A repository, a folder in it ("" for all of it), a branch, tag or commit, and the layers that are needed."""

    name: str
    repo: str
    folder: str
    revision: str | None
    layers: tuple[int, ...] | None
    embedded: tuple[str, ...]

    def select(self, sizes: dict[str, int | None]) -> list[str]:
        """What the formats need of these files."""
        return sorted(name for name, size in sizes.items() if self._needs(PurePosixPath(name), size))

    def _needs(self, path: PurePosixPath, size: int | None) -> bool:
        if self.folder and not path.is_relative_to(self.folder):
            return False
        if path.name in _CONFIGS:
            return (size or 0) <= TEXT_LIMIT and self._wants(path)
        return bool(_WEIGHTS.fullmatch(path.name)) and self._wants(path)

    def _wants(self, path: PurePosixPath) -> bool:
        layer = _layer(str(path))
        return self.layers is None or layer is None or layer in self.layers


def resolve(
    name: str, *, revision: str | None = None, layers: Sequence[int] | None = None, embedded: Iterable[str] = ()
) -> ResolvedSet:
    """The folder of a set.

    Args:
        name: a local folder, or `org/name`, with `@revision` behind it for a branch, tag or commit. A folder within a
            repository is `hf://org/name/folder`.
        revision: the same as `@revision`.
        layers: fetch only these layers' weights.
        embedded: names of the embedded sets, for messages.

    Raises:
        CheckpointError: no such repository or revision, nothing in it that a format knows, several dictionaries for one
            layer, no such layer, an interrupted download, or a cache that lacks files and no connection.
    """
    match = _ID.fullmatch(name)
    if match is None or (not match["marked"] and (match["folder"] or name[0] in ".~" or is_there(name))):
        return _local(name, revision)
    given = [text for text in (match["revision"], revision) if text]
    if len(set(given)) > 1:
        raise CheckpointError(
            "two revisions given",
            expected=f"one revision of {match['repo']}",
            found=" and ".join(given),
            repair="leave one away",
        )
    wanted = None if layers is None else tuple(layers)
    wish = _Wish(name, match["repo"], match["folder"].strip("/"), next(iter(given), None), wanted, tuple(embedded))
    return _fetch(wish)


def _local(name: str, revision: str | None) -> ResolvedSet:
    if revision is not None:
        raise CheckpointError(
            f"the folder {name} has no revision {revision}",
            expected="a hub id such as KokosDev/qwen25-32b-clt",
            found="a local folder",
            where=name,
            repair="leave the revision away",
        )
    try:
        root = Path(name).expanduser()
    except RuntimeError:  # `~name` of a user that does not exist
        root = Path(name)
    snapshot = hub_snapshot(root)
    return ResolvedSet(root, snapshot.repo, snapshot.commit) if snapshot else ResolvedSet(root)


def _fetch(wish: _Wish) -> ResolvedSet:
    try:
        info = huggingface_hub.HfApi().model_info(wish.repo, revision=wish.revision, files_metadata=True)
    except Exception as error:  # the hub's client raises the errors of its transport, which differ by its version
        return _cached(wish, error)
    sizes: dict[str, int | None] = {file.rfilename: file.size for file in info.siblings or ()}
    chosen = wish.select(sizes)
    _check_choice(wish, chosen, sizes)
    try:
        patterns = [glob.escape(name) for name in chosen]
        snapshot = Path(huggingface_hub.snapshot_download(wish.repo, revision=wish.revision, allow_patterns=patterns))
    except Exception as error:  # as above; or the disk is full
        raise CheckpointError(
            f"the download of {wish.repo} was interrupted",
            expected=f"{len(chosen)} files, {sum(sizes[name] or 0 for name in chosen):,} bytes",
            found=first_line(error, 200),
            where=wish.name,
            repair="run it again: what has arrived is kept",
        ) from None
    return _finished(wish, snapshot, chosen, sizes, ())


def _cached(wish: _Wish, why: Exception) -> ResolvedSet:
    """The set from the hub's cache, if the cache has every file that is needed."""
    try:  # a pattern that matches nothing, so that the client does not check which files are missing
        snapshot = huggingface_hub.snapshot_download(
            wish.repo, revision=wish.revision, local_files_only=True, allow_patterns=[]
        )
    except (OSError, ValueError):
        raise CheckpointError(
            f"cannot find the transcoders {wish.name!r}",
            expected=", ".join([*wish.embedded, "a folder, or a hub id such as KokosDev/qwen25-32b-clt"]),
            found=first_line(why, 200),
            where=f"{wish.repo} at {wish.revision}" if wish.revision else wish.repo,
            repair="check the name and the revision; a private repository needs `hf auth login`",
        ) from None
    root = Path(snapshot)
    sizes = _known_files(wish, root)
    chosen = wish.select(sizes)
    _check_choice(wish, chosen, sizes)
    offline = isinstance(why, OfflineModeIsEnabled)
    note = f"{wish.repo}: the hub does not answer ({first_line(why, 80)}); using commit {root.name[:12]} of the cache"
    return _finished(wish, root, chosen, sizes, () if offline else (note,))


def _known_files(wish: _Wish, snapshot: Path) -> dict[str, int | None]:
    """The repository's files as the cache lists them; else the files that are there and those its manifest names."""
    try:
        tree = huggingface_hub.get_cached_repo_tree(wish.repo, revision=snapshot.name)
        return {file.path: file.size for file in tree}
    except (CachedRepoTreeNotFoundError, ValueError):
        pass
    found: dict[str, int | None] = dict.fromkeys(_files(snapshot))
    manifest = snapshot / wish.folder / "manifest.json"
    if is_file(manifest):
        content = read_json(manifest)
        layers = content.get("layers") if isinstance(content, dict) else None
        entries = layers.values() if isinstance(layers, dict) else ()
        names = (entry.get("file") for entry in entries if isinstance(entry, dict))
        found |= {str(PurePosixPath(wish.folder, name)): None for name in names if isinstance(name, str)}
    return found


def _files(snapshot: Path) -> list[str]:
    """Everything that is no folder, broken links included."""
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not is_folder(path)]


def _check_choice(wish: _Wish, chosen: list[str], sizes: dict[str, int | None]) -> None:
    weights = [name for name in chosen if PurePosixPath(name).name not in _CONFIGS]
    where = f"{wish.repo}/{wish.folder}".rstrip("/")
    present = sorted({layer for name in sizes if _is_weight(name) and (layer := _layer(name)) is not None})
    missing = sorted(set(wish.layers or ()) - set(present)) if present else []
    if missing:
        raise CheckpointError(
            f"no transcoder for layer {missing[0]}",
            expected=f"layers among {', '.join(map(str, present))}"[:300],
            found=f"nothing for layers {', '.join(map(str, missing))}"[:300],
            where=where,
            repair="choose layers that the set has",
        )
    if not weights:
        raise CheckpointError(
            f"no transcoders found in {where}",
            expected="transcoder_L0.pt, layer_0.safetensors, sae_weights.safetensors, params.npz, …",
            found=(", ".join(sorted(sizes)[:6]) + f" ({len(sizes)} files)") if sizes else "no files",
            where=wish.name,
            repair="name another repository, or a folder of this one as hf://org/name/folder",
        )
    _check_single(weights, where, wish)


def _check_single(weights: list[str], where: str, wish: _Wish) -> None:
    by_layer: dict[tuple[int | None, str], list[str]] = {}
    for name in weights:
        path = PurePosixPath(name)
        by_layer.setdefault((_layer(name), path.name), []).append(str(path.parent))
    twice = next((folders for folders in by_layer.values() if len(folders) > 1), None)
    if twice:
        raise CheckpointError(
            f"several sets found in {where}",
            expected="one dictionary for each layer",
            found=", ".join(twice[:4]) + (f", … ({len(twice)})" if len(twice) > 4 else ""),
            where=wish.name,
            repair=f"name one of the folders: hf://{wish.repo}/{twice[0]}",
        )


def _finished(
    wish: _Wish, snapshot: Path, chosen: list[str], sizes: dict[str, int | None], notes: tuple[str, ...]
) -> ResolvedSet:
    bad = [name for name in chosen if not _whole(snapshot / name, sizes[name])]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(chosen)} files of {wish.repo} are missing or incomplete",
            expected=f"all files of commit {snapshot.name[:12]} in the cache",
            found=f"without {', '.join(bad[:8])}" + (", …" if len(bad) > 8 else ""),
            where=str(snapshot),
            repair="run it once with a connection to the hub: what is there is kept",
        )
    weights = [name for name in chosen if _is_weight(name)]
    layers = sorted({layer for name in weights if (layer := _layer(name)) is not None})
    gaps = sorted(set(range(layers[0], layers[-1])) - set(layers)) if layers and wish.layers is None else []
    said = [*notes]
    if gaps:
        said.append(f"{wish.repo} has no file for layer {', '.join(map(str, gaps))}")
    extra = sorted(name for name in _files(snapshot) if _is_weight(name) and name not in sizes)
    if extra:
        said.append(f"the cache of {wish.repo} has files that the repository has not: {', '.join(extra[:8])}")
    return ResolvedSet(snapshot / wish.folder, wish.repo, snapshot.name, tuple(said))


def _whole(path: Path, size: int | None) -> bool:
    return is_file(path) and size in (None, path.stat().st_size)


def _is_weight(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(PurePosixPath(name).name))


def _layer(name: str) -> int | None:
    """The layer number in the name of a file, or of the folder it is in."""
    found = _LAYER.findall(name)
    return int(found[-1]) if found else None
