"""Files are written whole or not at all, and the same content gives the same bytes."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hooks import files
from hooks.errors import CheckpointError, OutputError


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def half_write(path: Path, error: type[BaseException]) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise error


def test_replacing_writes_the_new_content_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "graph.json"  # folders are made
    with files.replacing(path) as temporary:
        assert temporary.parent == path.parent  # same file system: the rename is atomic
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert not path.exists()
    assert listing(tmp_path) == {"a/b/graph.json": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", [{}, {"graph.json": b"old"}], ids=["no file", "old file"])
def test_an_error_inside_leaves_what_was_there(tmp_path, before, error):
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        half_write(tmp_path / "graph.json", error)
    assert listing(tmp_path) == before


def test_replacing_gives_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    files.write_text(tmp_path / "ours", "text")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1  # not the 0600 of temporary files


@pytest.mark.parametrize("below", ["file.txt/graph.json", "file.txt/deeper/graph.json"])
def test_below_a_regular_file_nothing_can_be_written(tmp_path, below):
    (tmp_path / "file.txt").write_text("in the way")
    for attempt in (files.check_writable, lambda path: files.write_text(path, "x")):
        with pytest.raises(OutputError, match="cannot write") as caught:
            attempt(tmp_path / below)
        assert caught.value.found
        assert "--out" in caught.value.repair
    assert listing(tmp_path) == {"file.txt": b"in the way"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_output_error(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        files.write_text(locked / "graph.json", "x")
    locked.chmod(0o700)
    assert listing(tmp_path) == {}


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "graph").mkdir()
    for attempt in (files.check_writable, lambda path: files.write_text(path, "x")):
        with pytest.raises(OutputError, match="cannot write"):
            attempt(tmp_path / "graph")
    assert list(tmp_path.rglob("*")) == [tmp_path / "graph"]


def test_check_writable_keeps_an_existing_file(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text("old")
    os.utime(path, (1, 1))
    files.check_writable(path)
    assert listing(tmp_path) == {"graph.json": b"old"}
    assert path.stat().st_mtime == 1


def test_check_writable_leaves_no_file(tmp_path):
    files.check_writable(tmp_path / "graph.json")
    assert list(tmp_path.rglob("*")) == []


def test_check_writable_leaves_no_folder(tmp_path):
    files.check_writable(tmp_path / "new" / "deeper" / "graph.json")
    assert list(tmp_path.rglob("*")) == []


def test_json_is_readable_utf8_with_a_last_newline(tmp_path):
    data = {"token": " Zürich", "sign": "−", "rows": [1, 2.5, None]}
    files.write_json(tmp_path / "x.json", data)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "Zürich" in text
    assert text.endswith("}\n")
    assert json.loads(text) == data


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"bad": object()})
    assert listing(tmp_path) == {"x.json": b"old"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "W": torch.randn(6, 4, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "turned": torch.randn(2, 5, generator=generator).T,  # not contiguous
        "ids": torch.tensor([7, 8]),
    }


@pytest.mark.parametrize("metadata", [None, {"about": "one key ü"}])
def test_safetensors_come_back_bit_by_bit_from_reproducible_bytes(tmp_path, metadata):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    files.write_safetensors(one, tensors(), metadata)
    files.write_safetensors(two, dict(reversed(tensors().items())), metadata)  # the order of the dict does not matter
    assert one.read_bytes() == two.read_bytes()
    assert files.sha256(one) == files.sha256(two)
    assert files.safetensors_metadata(one) == (metadata or {})
    assert files.safetensors_shapes(one) == {name: tuple(t.shape) for name, t in tensors().items()}
    back = load_file(one)
    for name, tensor in tensors().items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
        assert torch.equal(files.safetensors_load(one, name), tensor)


def test_several_metadata_keys_are_a_fault_of_ours(tmp_path):
    with pytest.raises(AssertionError, match="at random"):
        files.write_safetensors(tmp_path / "x.safetensors", tensors(), {"a": "1", "b": "2"})
    assert listing(tmp_path) == {}


def test_safetensors_that_cannot_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match="meta"):
        files.write_safetensors(path, {"x": torch.zeros(2, device="meta")})
    assert listing(tmp_path) == {"x.safetensors": b"old"}


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_single_rows_are_the_rows_of_the_matrix(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    files.write_safetensors(path, tensors())
    assert torch.equal(files.safetensors_rows(path, "W", rows), tensors()["W"][rows])


@pytest.mark.parametrize("content", [None, b"", b"x" * 99, b"\xff" * 8])
def test_a_damaged_safetensors_file_is_a_user_error(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    for read in (
        files.safetensors_shapes,
        files.safetensors_metadata,
        lambda path: files.safetensors_load(path, "W"),
    ):
        with pytest.raises(CheckpointError, match="not a readable safetensors file") as caught:
            read(path)
        assert caught.value.where == str(path)
        assert caught.value.found


def test_sha256_is_the_known_digest(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_open_pt_maps_instead_of_reading(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    tensor = files.open_pt(path)["x"]
    assert torch.equal(tensor, torch.arange(4.0))
    assert str(path) in Path("/proc/self/maps").read_text()
    del tensor
    assert str(path) not in Path("/proc/self/maps").read_text()
