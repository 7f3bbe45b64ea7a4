"""kill -9 while files are written: afterwards each file is complete, old or new, and the next run removes leftovers.

Every function that writes files is killed at lines of `hooks/files/output.py` and at random moments. Each point is a
separate process, forked from this one, so that nothing of it survives. If there was no file before, there may be none
afterwards.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from _models import main, transcoder

from circuits import trace
from circuits.demo import PICTURES
from circuits.export import EXPORTERS, export
from circuits.plots import sweep_plot
from hooks import Ablate, HookedModel
from hooks.check import Texts, calibrate
from hooks.checkpoints import convert, save_findings
from hooks.checkpoints.conversion import WRITERS
from hooks.demo import TRANSCODERS
from hooks.files import output, write_text
from hooks.files.output import PREFIX
from hooks.formats import native, recognise
from hooks.sites import SiteSpec

PROMPTS = ("fact: the capital of the state containing Dallas is", "fact: the capital of Texas is")
NEVER = 1 << 60  # a line number that is never reached
PATIENCE = 60.0  # seconds after which a writer that was not killed counts as hanging

Write = Callable[[Path, int], Any]
"""Writes one of two versions into a folder."""


def writers(source: Path) -> dict[str, Write]:
    """Every way in which the product writes files, with both versions made beforehand; `source` is a set to convert."""
    model = HookedModel.load("demo")
    graphs = [trace(model, prompt, max_nodes=30, sample=20, progress=False) for prompt in PROMPTS]
    sweeps = [model.sweep(prompt, [Ablate(f"L3/383@{pos}") for pos in (-1, -2)]) for prompt in PROMPTS]
    sets = [recognise(TRANSCODERS[name]) for name in ("demo", "demo-dense")]
    found = [calibrate(model.host, one, Texts.built_in(True), tokens=60).findings for one in sets]

    def demo(folder: Path, version: int) -> None:
        for name, kind in PICTURES.items():
            export(graphs[version], folder / name, kind)
        write_text(folder / "report.md", f"# Version {version}\n" * 1000)

    made: dict[str, Write] = {
        "graph": lambda folder, version: graphs[version].save(folder / "g.graph"),
        "demo folder": demo,
        "findings": lambda folder, version: save_findings(folder, found[version]),
        "picture of a sweep": lambda folder, version: sweep_plot(sweeps[version], folder / "s.png"),
    }
    for suffix in (".csv", ".json", ".parquet"):
        made[f"sweep to {suffix}"] = lambda folder, version, to=suffix: sweeps[version].save(folder / f"t{to}")
    for name in EXPORTERS:
        made[f"export to {name}"] = lambda folder, version, to=name: export(graphs[version], folder / f"{to}.svg", to)
    for name in WRITERS:
        made[f"convert to {name}"] = lambda folder, version, to=name: _convert(source, folder / f"set-{version}", to)
    return made


def _convert(source: Path, target: Path, to: str) -> None:
    if not target.exists():
        convert(source, target, to=to)


def _set(folder: Path) -> Path:
    """Transcoders that every format can hold."""
    site = SiteSpec("resid_pre")
    native.save(folder, [transcoder(layer, 64) for layer in range(4)], read=site, write=site, base_model="small")
    return folder


# -- one point ---------------------------------------------------------------------------------------------------------


def kill(write: Write, points: random.Random, by_line: bool, scratch: Path) -> str:
    """Kill one writer once; returns what is wrong afterwards, or nothing."""
    scratch.mkdir()
    wanted = [_whole(write, version, scratch / f"whole-{version}") for version in (0, 1)]
    folder = scratch / "killed"
    folder.mkdir()
    if points.random() < 0.7:
        _wait(_forked(lambda: write(folder, 0)), PATIENCE)
    before = _files(folder)
    if by_line:
        lines = int((scratch / "lines").read_text())
        child = _forked(lambda: _dying(write, folder, points.randrange(1, lines + 1)))
        ended = _wait(child, PATIENCE)
    else:
        child = _forked(lambda: write(folder, 1))
        ended = _wait(child, points.random() * float((scratch / "seconds").read_text()), kill=True)
    if not ended:
        return "the writer hangs"
    for name, content in _files(folder).items():
        if PREFIX not in name and content not in (before.get(name), wanted[1].get(name)):
            return f"{name} is neither the old file nor the new one"
    if lost := [name for name in before if name not in _files(folder) and PREFIX not in name]:
        return f"{lost[0]} is gone"
    if not _wait(_forked(lambda: write(folder, 1)), PATIENCE) or os.waitstatus_to_exitcode(_STATUS[-1]):
        return "the next run fails"
    if stale := [str(path) for path in folder.rglob("*") if path.name.startswith(PREFIX)]:
        return f"{stale[0]} is left after the next run"
    return "" if _files(folder) == before | wanted[1] else "the next run does not write the new files"


_STATUS: list[int] = []


def _whole(write: Write, version: int, folder: Path) -> dict[str, bytes]:
    """The files of a run that nothing stops; the time that it takes and the lines of ours are noted beside them."""
    folder.mkdir()

    def counted() -> None:
        started, count = time.perf_counter(), _Lines(NEVER)
        sys.settrace(count)
        write(folder, version)
        sys.settrace(None)
        (folder.parent / "seconds").write_text(str(time.perf_counter() - started))
        (folder.parent / "lines").write_text(str(count.seen))

    if not _wait(_forked(counted), PATIENCE) or os.waitstatus_to_exitcode(_STATUS[-1]):
        raise AssertionError("a writer that nothing stops fails")
    return _files(folder)


class _Lines:
    """A trace function that counts the lines of `hooks/files/output.py` and ends the process at one of them."""

    def __init__(self, last: int):
        self.seen, self.last = 0, last

    def __call__(self, frame: FrameType, event: str, argument: object) -> "_Lines | None":
        if frame.f_code.co_filename != output.__file__:
            return None
        self.seen += event == "line"
        if self.seen >= self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self


def _dying(write: Write, folder: Path, line: int) -> None:
    sys.settrace(_Lines(line))
    write(folder, 1)


def _forked(work: Callable[[], None]) -> int:
    """A copy of this process that does one thing."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _wait(child: int, seconds: float, kill: bool = False) -> bool:
    """Whether a process has ended by then; one that has not is killed, as a fault or because that is the point."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _STATUS.append(status)
            return True
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _STATUS.append(os.waitpid(child, 0)[1])
    return kill


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in _below(folder)}


def _below(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


def measure(count: int, seed: int) -> dict[str, Any]:
    """`count` points, the writers in turn, at lines and at moments in turn."""
    torch.set_num_threads(1)
    points = random.Random(seed)
    faults, killed = [], 0
    with tempfile.TemporaryDirectory() as root:
        every = list(writers(_set(Path(root) / "source")).items())
        points.shuffle(every)
        for i in range(count):
            name, write = every[i % len(every)]
            by_line = (i // len(every) + i) % 2 == 0
            fault = kill(write, points, by_line, Path(root) / str(i))
            killed += any(os.WIFSIGNALED(status) for status in _STATUS)
            _STATUS.clear()
            faults += [f"point {i}, {name}, {'line' if by_line else 'moment'}: {fault}"] if fault else []
            shutil.rmtree(Path(root) / str(i))
    return {"count": count, "failed": len(faults), "killed": killed, "writers": len(every), "faults": faults[:20]}


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or "", 100))
