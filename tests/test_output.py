"""Files are written whole or not at all, where they are meant to be, and nothing else is touched or left behind."""

import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hooks.errors import OutputError
from hooks.files import output

ROOT = Path(__file__).parents[1]


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def half_write(path: Path, error: type[BaseException]) -> None:
    with output.replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise error


def test_replacing_writes_the_new_content_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "graph.json"  # folders are made
    with output.replacing(path) as temporary:
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
    output.write_text(tmp_path / "ours", "text")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1  # not the 0600 of temporary files


@pytest.mark.parametrize("below", ["file.txt/graph.json", "file.txt/deeper/graph.json"])
def test_below_a_regular_file_nothing_can_be_written(tmp_path, below):
    (tmp_path / "file.txt").write_text("in the way")
    for attempt in (output.check_writable, lambda path: output.write_text(path, "x")):
        with pytest.raises(OutputError, match="cannot write") as caught:
            attempt(tmp_path / below)
        assert caught.value.found
        assert "--out" in caught.value.repair
    assert listing(tmp_path) == {"file.txt": b"in the way"}


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "graph").mkdir()
    for attempt in (output.check_writable, lambda path: output.write_text(path, "x")):
        with pytest.raises(OutputError, match="cannot write"):
            attempt(tmp_path / "graph")
    assert list(tmp_path.rglob("*")) == [tmp_path / "graph"]


def test_check_writable_keeps_an_existing_file(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text("old")
    os.utime(path, (1, 1))
    output.check_writable(path)
    assert listing(tmp_path) == {"graph.json": b"old"}
    assert path.stat().st_mtime == 1


def test_check_writable_leaves_no_file(tmp_path):
    output.check_writable(tmp_path / "graph.json")
    assert list(tmp_path.rglob("*")) == []


def test_check_writable_leaves_no_folder(tmp_path):
    output.check_writable(tmp_path / "new" / "deeper" / "graph.json")
    assert list(tmp_path.rglob("*")) == []


def test_json_is_readable_utf8_with_a_last_newline(tmp_path):
    data = {"token": " Zürich", "sign": "−", "rows": [1, 2.5, None]}
    output.write_json(tmp_path / "x.json", data)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "Zürich" in text
    assert text.endswith("}\n")
    assert json.loads(text) == data


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(TypeError):
        output.write_json(tmp_path / "x.json", {"bad": object()})
    assert listing(tmp_path) == {"x.json": b"old"}


# -- what a path stands for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
def test_a_link_is_written_through(tmp_path, there):
    (tmp_path / "real").mkdir()
    if there:
        (tmp_path / "real" / "x.json").write_text("old")
    (tmp_path / "near").symlink_to("real/x.json")
    (tmp_path / "far").symlink_to(tmp_path / "near")
    output.check_writable(tmp_path / "far")
    output.write_text(tmp_path / "far", "new")
    assert (tmp_path / "real" / "x.json").read_text() == "new"
    assert (tmp_path / "far").is_symlink()
    assert (tmp_path / "near").is_symlink()
    assert {path.name for path in tmp_path.rglob("*")} == {"real", "x.json", "near", "far"}


def test_a_link_to_an_empty_folder_is_filled_through(tmp_path):
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("real")
    with output.new_folder(tmp_path / "link", 1) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o750


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o777])
def test_a_mode_is_kept(tmp_path, mode):
    path = tmp_path / "x"
    path.touch()
    path.chmod(mode)
    output.write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_is_secret_stays_so_while_it_is_written(tmp_path):
    path = tmp_path / "x"
    path.touch(mode=0o600)
    with output.replacing(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_pipe_gets_the_bytes_and_stays_a_pipe(tmp_path):
    path, got = tmp_path / "pipe.json", []
    os.mkfifo(path)
    output.check_writable(path)  # neither waits for a reader nor ends one
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    output.write_text(path, "all of it")
    reader.join(20)
    assert got == ["all of it"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_stays_a_device(tmp_path):
    """/dev/null through a link of ours, so that a fault costs the link and not the device."""
    link, before = tmp_path / "null", os.stat("/dev/null")
    link.symlink_to("/dev/null")
    output.check_writable(link)
    output.write_text(link, "gone")
    assert link.is_symlink()
    after = os.lstat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_rdev, after.st_mode, after.st_ino) == (before.st_rdev, before.st_mode, before.st_ino)


def test_a_full_device_is_said():
    with pytest.raises(OutputError, match="could not be written to its end"):
        output.write_text(Path("/dev/full"), "x")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("into", ["a file", "a pipe"])
def test_an_open_descriptor_is_written_to(tmp_path, name, into):
    """What is printed before and after stays in its place: the file behind the descriptor is not replaced."""
    code = "import sys; from pathlib import Path; from hooks.files import output; print('before', flush=True)\n"
    code += f"output.check_writable(Path({name!r})); output.write_text(Path({name!r}), 'file\\n'); print('after')"
    command = [sys.executable, "-c", code]
    if into == "a pipe":
        said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        with (tmp_path / "out").open("w") as file:
            subprocess.run(command, cwd=ROOT, stdout=file, check=True)
        said = (tmp_path / "out").read_text()
    assert said.split() == ["before", "file", "after"]


def refused(path: Path, found: str) -> None:
    for attempt in (output.check_writable, lambda path: output.write_text(path, "x")):
        with pytest.raises(OutputError, match="cannot write") as caught:
            attempt(path)
        assert found in caught.value.found
        assert len(str(caught.value)) < 1000


def test_what_can_be_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        refused(tmp_path / "s", "a socket")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "symbolic links")
    refused(tmp_path / ("n" * 300), "too long")
    refused(tmp_path / ("n/" * 3000), "too long")
    refused(tmp_path / "a\0b", "null byte")


def test_the_longest_names_can_be_written(tmp_path):
    """Neither the stem nor the suffix goes into the temporary name as a whole."""
    for name in ("n" * 255, "x." + "n" * 253):
        output.write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to pass every door."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_searched_and_a_file_that_is_read_only(tmp_path):
    locked, full, kept = tmp_path / "locked", tmp_path / "full", tmp_path / "kept"
    locked.mkdir(mode=0o000)
    full.mkdir(mode=0o500)
    kept.touch(mode=0o444)
    with nobody():
        refused(locked / "deeper" / "x", "Permission denied")
        refused(full / "x", "Permission denied")
        refused(kept, "Permission denied")
    locked.chmod(0o700)
    assert list(locked.iterdir()) == list(full.iterdir()) == []


# -- what a killed run leaves ------------------------------------------------------------------------------------------


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    code = "import os, signal, sys\nfrom pathlib import Path\nfrom hooks.files import output\n"
    code += "here = Path(sys.argv[1])\n"
    code += "with output.replacing(here / 'x.json') as file, output.new_folder(here / 'set', 1) as folder:\n"
    code += "    (folder / 'part').write_text('half'); file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert all(name.startswith(output.PREFIX) for name in left)
    output.write_text(tmp_path / "other", "new")
    assert listing(tmp_path) == {"other": b"new"}


def test_the_files_of_a_running_writer_stay(tmp_path):
    with output.replacing(tmp_path / "x") as file, output.new_folder(tmp_path / "set", 1) as folder:
        file.write_text("mine")
        (folder / "part").write_text("mine")
        output.write_text(tmp_path / "y", "another's")
        assert file.read_text() == "mine"
        assert (folder / "part").read_text() == "mine"
    assert listing(tmp_path) == {"x": b"mine", "y": b"another's", "set/part": b"mine"}


def test_where_files_cannot_be_locked_nothing_is_taken_for_stale(tmp_path, monkeypatch):
    """Some network file systems have no locks: then only what the writer itself removes is removed."""
    other = tmp_path / f"{output.PREFIX}0123456789ab.json"
    other.write_text("another machine's")

    def unsupported(handle: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    output.write_text(tmp_path / "x", "new")
    assert listing(tmp_path) == {"x": b"new", other.name: b"another machine's"}
