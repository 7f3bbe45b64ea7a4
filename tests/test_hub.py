"""Sets of the hub: what is fetched, what the cache serves, what is named. No request leaves this machine."""

import io
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from worlds import random_transcoder

from circuits.cli import main
from hooks import HookedModel
from hooks.checkpoints import TranscoderStore
from hooks.demo import PROMPT, WEIGHTS
from hooks.errors import CheckpointError
from hooks.files import ResolvedSet, hub_snapshot, resolve
from hooks.formats import native, recognise
from hooks.sites import SiteSpec

WIDTH = json.loads((WEIGHTS / "config.json").read_text())["hidden_size"]
REPO, COMMIT, OLDER = "org/a-set", "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no connection."""
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    assert constants.HF_HUB_OFFLINE
    return path


def published(layer: int) -> bytes:
    coder = random_transcoder(layer, WIDTH)
    out = io.BytesIO()
    state = {"enc.0.weight": coder.norm_weight, "enc.0.bias": coder.norm_bias, "enc.1.weight": coder.W_enc}
    state |= {"enc.1.bias": coder.b_enc, "dec.weight": coder.W_dec.T.contiguous(), "dec.bias": coder.b_dec}
    torch.save({"layer": layer, "state_dict": state, "training_metadata": {"final_l0_pct": 12.0}}, out)
    return out.getvalue()


def native_files(tmp_path: Path, layers: int = 3) -> dict[str, bytes]:
    site = SiteSpec("resid_pre")
    root = tmp_path / "made"
    native.save(root, [random_transcoder(n, WIDTH) for n in range(layers)], read=site, write=site)
    return {path.name: path.read_bytes() for path in root.iterdir()}


def store_in(cache: Path, files: dict[str, bytes], *, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A repository as the hub's client leaves it: links into blobs, named by their content."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for name, content in files.items():
        blob = repo / "blobs" / f"{abs(hash((name, content))):064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return snapshot


# -- folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sets", "./sets/a", "../x", "/no/where", "a/b/c", "~/sets", "~nobody-here/x", "", "a b/c"]
)
def test_what_is_no_hub_id_stays_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = resolve(name)
    assert (found.repo, found.revision, found.notes) == (None, None, ())
    assert found.root in (Path(name), Path(name).expanduser() if "nobody" not in name else Path(name))


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "a-set").mkdir(parents=True)
    assert resolve(REPO) == ResolvedSet(Path(REPO))


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(CheckpointError, match="has no revision main"):
        resolve(str(tmp_path), revision="main")


# -- the cache alone -------------------------------------------------------------------------------------------


def test_a_folder_laid_out_like_the_hubs_cache_loads_offline(cache):
    snapshot = store_in(cache, {f"transcoder_L{n}.pt": published(n) for n in (0, 1)})
    found = resolve(REPO)
    assert found == ResolvedSet(snapshot, REPO, COMMIT)
    store = TranscoderStore.open(found.root, read="resid_pre", write="resid_pre")
    assert torch.equal(store[1].W_enc, random_transcoder(1, WIDTH).W_enc)
    assert recognise(found.root).revision == COMMIT  # which a conversion writes into its manifest


def test_the_command_line_takes_a_hub_id_of_the_cache(cache, capsys):
    store_in(cache, {"transcoder_L0.pt": published(0)})
    assert main(["features", PROMPT, "--json", "--transcoders", REPO]) == 0
    assert {row["layer"] for row in json.loads(capsys.readouterr().out)["features"]} == {0}


def test_a_set_in_our_own_format_loads_from_the_cache(cache, tmp_path):
    store_in(cache, native_files(tmp_path))
    model = HookedModel.load("demo", REPO)
    assert model.store.layers == (0, 1, 2)
    assert model.store.name == REPO


def test_a_snapshot_given_as_a_folder_says_what_it_is(cache):
    snapshot = store_in(cache, {"transcoder_L0.pt": published(0)})
    assert resolve(str(snapshot)) == ResolvedSet(snapshot, REPO, COMMIT)
    assert hub_snapshot(snapshot / "below").repo == REPO
    assert hub_snapshot(cache) is None


@pytest.mark.parametrize("form", ["name@revision", "revision=", "commit", "both"])
def test_a_revision_is_taken_and_returned_as_a_commit(cache, form):
    store_in(cache, {"transcoder_L0.pt": published(0)})
    older = store_in(cache, {"transcoder_L0.pt": published(1)}, commit=OLDER, ref="v1")
    found = {
        "name@revision": lambda: resolve(f"{REPO}@v1"),
        "revision=": lambda: resolve(REPO, revision="v1"),
        "commit": lambda: resolve(f"{REPO}@{OLDER}"),
        "both": lambda: resolve(f"{REPO}@v1", revision="v1"),
    }[form]()
    assert (found.root, found.revision) == (older, OLDER)


def test_two_revisions_are_one_too_many(cache):
    with pytest.raises(CheckpointError, match="two revisions given"):
        resolve(f"{REPO}@v1", revision="v2")


@pytest.mark.parametrize("name", ["no/where", f"{REPO}@v9", f"hf://{REPO}/below@v9"])
def test_what_the_cache_does_not_have_is_said(cache, name):
    store_in(cache, {"transcoder_L0.pt": published(0)})
    with pytest.raises(CheckpointError, match="cannot find the transcoders") as caught:
        resolve(name, embedded=("demo", "demo-dense"))
    assert "demo-dense" in caught.value.expected
    assert caught.value.repair
    if "@" in name:
        assert "v9" in caught.value.where


def test_a_layer_of_an_own_set_that_was_not_fetched_is_named(cache, tmp_path, caplog):
    files = native_files(tmp_path)
    del files["layer_01.safetensors"]
    snapshot = store_in(cache, files)
    with pytest.raises(CheckpointError, match="1 of 4 files of org/a-set are missing or incomplete") as caught:
        resolve(REPO)
    assert "layer_01.safetensors" in caught.value.found
    assert resolve(REPO, layers=[0, 2]).root == snapshot
    with caplog.at_level(logging.WARNING):
        store = TranscoderStore.open(snapshot, layers=[0, 2])
    assert store.layers == (0, 2)
    assert "not fetched from the hub: layer 1" in caplog.text


def test_a_link_to_a_blob_that_is_gone_is_named(cache):
    snapshot = store_in(cache, {f"transcoder_L{n}.pt": published(n) for n in (0, 1)})
    (snapshot / "transcoder_L1.pt").resolve().unlink()
    with pytest.raises(CheckpointError, match="missing or incomplete") as caught:
        resolve(REPO)
    assert caught.value.found == "without transcoder_L1.pt"
    assert resolve(REPO, layers=[0]).root == snapshot


def test_links_into_another_repository_are_refused(cache):
    snapshot = store_in(cache, {"transcoder_L0.pt": published(0)})
    other = cache / "models--org--other" / "blobs" / "secret"
    other.parent.mkdir(parents=True)
    other.write_bytes(published(1))
    (snapshot / "transcoder_L1.pt").symlink_to(other)
    with pytest.raises(CheckpointError, match=r"transcoder_L1\.pt leads out of its folder") as caught:
        recognise(resolve(REPO).root)
    assert caught.value.found == f"{snapshot / 'transcoder_L1.pt'} -> {other}"
    assert "models--org--a-set" in caught.value.expected


def test_a_folder_within_a_repository(cache):
    files = {f"layer_{n}/width_16k/average_l0_{n}/params.npz": b"" for n in (3, 4)}
    snapshot = store_in(cache, files)
    found = resolve(f"hf://{REPO}/layer_3/width_16k@main", layers=None)
    assert found.root == snapshot / "layer_3" / "width_16k"
    assert (found.repo, found.revision) == (REPO, COMMIT)


# -- with a listing --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub that lists files and hands them out, or breaks; remembers what it was asked for."""

    class Hub:
        files: dict[str, bytes] = {}
        error: Exception | None = None
        breaks_after: int | None = None
        fetched: list[str] = []

        def model_info(self, repo: str, *, revision: str | None = None, files_metadata: bool = False) -> object:
            if self.error:
                raise self.error
            assert repo == REPO
            assert files_metadata
            files = [SimpleNamespace(rfilename=name, size=len(content)) for name, content in self.files.items()]
            return SimpleNamespace(sha=COMMIT, siblings=files)

        def snapshot_download(self, repo: str, *, revision: str | None = None, allow_patterns: list[str], **options):
            if options.get("local_files_only"):
                return real(repo, revision=revision, allow_patterns=allow_patterns, **options)
            chosen = list(huggingface_hub.utils.filter_repo_objects(self.files, allow_patterns=allow_patterns))
            snapshot = cache / "models--org--a-set" / "snapshots" / COMMIT
            for name in chosen[: self.breaks_after]:
                if not (snapshot / name).exists():
                    store_in(cache, {name: self.files[name]})
                    self.fetched.append(name)
            if self.breaks_after is not None:
                raise ConnectionError("the line went dead")
            return str(snapshot)

    real, it = huggingface_hub.snapshot_download, Hub()
    it.fetched = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: it)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", it.snapshot_download)
    return it


CARD = {
    "README.md": b"a card",
    "picture.png": b"png",
    ".gitattributes": b"",
    "mapping_L0.pt": b"x" * 99,
    "mapping_L1.pt": b"x" * 99,
    "metrics_L0.json": b"{}",
    "optimizer.pt": b"x",
    "model.safetensors": b"x" * 99,
    "features/0.json": b"{}",
}


def test_only_what_is_needed_is_fetched(hub):
    hub.files = {**CARD, **{f"transcoder_L{n}.pt": published(n) for n in range(3)}, "config.json": b"{}"}
    found = resolve(REPO)
    assert sorted(hub.fetched) == ["config.json", "transcoder_L0.pt", "transcoder_L1.pt", "transcoder_L2.pt"]
    assert (found.repo, found.revision, found.notes) == (REPO, COMMIT, ())
    assert TranscoderStore.open(found.root).layers == (0, 1, 2)


def test_only_the_wanted_layers_are_fetched(hub, tmp_path):
    hub.files = native_files(tmp_path, 12)
    found = resolve(REPO, layers=[1, 11])
    assert sorted(hub.fetched) == ["layer_01.safetensors", "layer_11.safetensors", "manifest.json"]
    assert TranscoderStore.open(found.root, layers=[1, 11]).layers == (1, 11)


FORMATS = {
    "circuit-tracer": ("config.yaml", "layer_{}.safetensors"),
    "sparsify": ("config.json", "layers.{}.mlp/cfg.json", "layers.{}.mlp/sae.safetensors"),
    "saelens": ("blocks.{}.hook_resid_pre/cfg.json", "blocks.{}.hook_resid_pre/sae_weights.safetensors"),
    "dictionary_learning": ("resid_post_layer_{}/trainer_0/ae.pt", "resid_post_layer_{}/trainer_0/config.json"),
    "gemma scope": ("layer_{}/width_16k/average_l0_9/params.npz",),
    "gemma scope 2": ("resid_post/layer_{}_width_16k_l0_small/config.json",
                      "resid_post/layer_{}_width_16k_l0_small/params.safetensors"),
    "qwen scope": ("layer{}.sae.pt",),
}  # fmt: skip


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_every_known_layout_is_fetched_layer_by_layer(hub, names):
    hub.files = {**CARD, **{name.format(layer): b"{}" for name in names for layer in (2, 12, 22)}}
    resolve(REPO, layers=[2])
    assert sorted(hub.fetched) == sorted(name.format(2) for name in names)
    resolve(REPO)
    assert set(hub.files) - set(hub.fetched) == set(CARD)


def test_a_large_text_is_not_fetched(hub):
    hub.files = {"transcoder_L0.pt": b"x", "config.json": bytes((16 << 20) + 1)}
    resolve(REPO)
    assert hub.fetched == ["transcoder_L0.pt"]


def test_a_repository_of_something_else_is_refused_before_anything_is_fetched(hub):
    hub.files = CARD
    with pytest.raises(CheckpointError, match="no transcoders found in org/a-set") as caught:
        resolve(REPO)
    assert "README.md" in caught.value.found
    assert not hub.fetched


def test_a_layer_that_the_repository_has_not_is_refused_before_anything_is_fetched(hub):
    hub.files = {f"transcoder_L{n}.pt": published(n) for n in (0, 2)}
    with pytest.raises(CheckpointError, match="no transcoder for layer 1") as caught:
        resolve(REPO, layers=[0, 1])
    assert caught.value.expected == "layers among 0, 2"
    assert not hub.fetched


def test_several_dictionaries_for_a_layer_are_refused_before_anything_is_fetched(hub):
    hub.files = {f"layer_3/width_16k/average_l0_{n}/params.npz": b"" for n in (9, 71)}
    with pytest.raises(CheckpointError, match="several sets found") as caught:
        resolve(REPO)
    assert "hf://org/a-set/layer_3/width_16k/average_l0_71" in caught.value.repair
    assert not hub.fetched
    resolve("hf://org/a-set/layer_3/width_16k/average_l0_71")
    assert hub.fetched == ["layer_3/width_16k/average_l0_71/params.npz"]


def test_an_interrupted_download_goes_on_where_it_stopped(hub):
    hub.files = {f"transcoder_L{n}.pt": published(n) for n in range(4)}
    hub.breaks_after = 2
    with pytest.raises(CheckpointError, match="the download of org/a-set was interrupted") as caught:
        resolve(REPO)
    assert "the line went dead" in caught.value.found
    assert "4 files" in caught.value.expected
    hub.breaks_after, before = None, list(hub.fetched)
    resolve(REPO)
    assert len(before) == 2
    assert sorted(hub.fetched) == sorted(hub.files)  # each once


def test_a_missing_layer_is_named_and_never_shifted(hub):
    hub.files = {f"transcoder_L{n}.pt": published(n) for n in (0, 1, 3)}
    found = resolve(REPO)
    assert found.notes == ("org/a-set has no file for layer 2",)
    assert TranscoderStore.open(found.root).layers == (0, 1, 3)


def test_files_that_the_repository_has_not_are_named(hub):
    hub.files = {"transcoder_L0.pt": published(0)}
    resolve(REPO)
    store_in(Path(constants.HF_HUB_CACHE), {"transcoder_L7.pt": published(7)})
    assert "transcoder_L7.pt" in resolve(REPO).notes[0]


def test_a_file_of_another_size_is_named(hub):
    hub.files = {"transcoder_L0.pt": published(0)}
    root = resolve(REPO).root
    (root / "transcoder_L0.pt").resolve().write_bytes(b"half")
    with pytest.raises(CheckpointError, match="missing or incomplete") as caught:
        resolve(REPO)
    assert caught.value.found == "without transcoder_L0.pt"


@pytest.mark.parametrize("offline", [True, False])
def test_without_an_answer_the_cache_serves_and_says_so(hub, offline):
    hub.files = {"transcoder_L0.pt": published(0)}
    root = resolve(REPO).root
    hub.error = OfflineModeIsEnabled("offline") if offline else TimeoutError("no answer")
    found = resolve(REPO)
    assert (found.root, found.revision) == (root, COMMIT)
    assert [("no answer" in note, COMMIT[:12] in note) for note in found.notes] == ([] if offline else [(True, True)])


def test_the_listing_of_an_earlier_download_tells_what_is_missing(hub, monkeypatch):
    hub.files = {f"transcoder_L{n}.pt": published(n) for n in range(3)}
    resolve(REPO, layers=[0, 1])
    hub.error = OfflineModeIsEnabled("offline")
    tree = [SimpleNamespace(path=name, size=len(content)) for name, content in hub.files.items()]
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", lambda repo, revision: tree)
    with pytest.raises(CheckpointError, match="1 of 3 files of org/a-set are missing") as caught:
        resolve(REPO)
    assert caught.value.found == "without transcoder_L2.pt"
    assert "connection" in caught.value.repair
    assert resolve(REPO, layers=[1]).revision == COMMIT


def test_what_the_hub_says_of_an_unknown_repository_is_passed_on(hub):
    hub.error = RepositoryNotFoundError("404 Client Error: Repository Not Found", response=SimpleNamespace(
        headers={}, status_code=404, request=None))  # fmt: skip
    with pytest.raises(CheckpointError, match="cannot find the transcoders 'org/a-set'") as caught:
        resolve(REPO)
    assert "404" in caught.value.found
