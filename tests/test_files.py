"""Weight files: what comes back is what was written, bit by bit; damage is said."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hooks.errors import CheckpointError
from hooks.files import weight_files as files


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


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
