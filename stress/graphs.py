"""Damaged graph files: each is refused with a message, or is a sound graph that every export can write.

    python stress/graphs.py --json [--count 600] [--seed 0]

A traced graph is written, and each copy damaged in one way: bits flipped, cut short, arrays swapped, lengthened, of
other types or ranges, nodes and edges doubled, NaN and infinities, facts of other types, deep or broken JSON, headers
that state too large sizes. Every file is loaded, exported in all formats, and exported by the command. Time is the CPU
time of loading; memory is the growth of the process's resident set while a file is loaded (on Linux, which records it).
"""

import argparse
import contextlib
import gc
import io
import json
import re
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from circuits import Graph, check_graph, trace
from circuits.cli import main as circuits
from circuits.export import EXPORTERS, export
from circuits.graph.nodes import KINDS
from hooks import HookedModel
from hooks.errors import UserError

PROMPT = "fact: the capital of the state containing Dallas is"
SECONDS, MEMORY, TIMES = 5.0, 200 << 20, 3  # the most a file may take: a fixed part, and so many times its own size
KEY = "qwen-circuits-graph"
TYPES = {
    "int64": "I64",
    "float64": "F64",
    "int32": "I32",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
    "bool": "BOOL",
}
ODD: tuple[Any, ...] = (
    None, True, -1, 1 << 40, 10**30, 1.5, 1e999, float("nan"), "", "x", "\ud800", "\x00\x1b$_^$", [], {}, [[]], [None],
    {"a": 1}, ["a"], [1, "a"], {"name": 3}, {"pos": -1}, "a" * 100_000,
)  # fmt: skip


class File:
    """The parts of a graph file: its columns, its facts, and further header entries."""

    def __init__(self, path: Path):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        self.head = json.loads(header.pop("__metadata__")[KEY])
        kinds = {stored: name for name, stored in TYPES.items()}
        self.columns = {
            name: np.frombuffer(raw[8 + length :][slice(*entry["data_offsets"])], kinds[entry["dtype"]]).copy()
            for name, entry in header.items()
        }

    def raw(self, text: str | None = None) -> bytes:
        """The file again; `text` in place of the facts' own JSON."""
        text = json.dumps(self.head) if text is None else text
        header: dict[str, Any] = {"__metadata__": {KEY: text}}
        body = b""
        for name, column in self.columns.items():
            end = len(body) + column.nbytes
            entry = {"dtype": TYPES[column.dtype.name], "shape": list(column.shape), "data_offsets": [len(body), end]}
            header[name], body = entry, body + column.tobytes()
        written = json.dumps(header).encode()
        return struct.pack("<Q", len(written)) + written + body


# ---- ways to damage: each gives the bytes of a file


def flipped(file: File, random: Random) -> bytes:
    """Single bits, anywhere."""
    raw = bytearray(file.raw())
    for _ in range(random.choice((1, 1, 8, 100))):
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    return bytes(raw)


def flipped_header(file: File, random: Random) -> bytes:
    """One bit of the header."""
    raw = bytearray(file.raw())
    raw[random.randrange(8 + struct.unpack("<Q", raw[:8])[0])] ^= 1 << random.randrange(8)
    return bytes(raw)


def cut(file: File, random: Random) -> bytes:
    """Cut short, or with bytes behind its end."""
    raw = file.raw()
    return (
        raw[: random.randrange(len(raw))] if random.random() < 0.8 else raw + random.randbytes(random.randrange(1, 64))
    )


def claims(file: File, random: Random) -> bytes:
    """A header that claims another length."""
    raw = file.raw()
    length = random.choice((0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, len(raw), len(raw) - 8, random.randrange(4096)))
    return struct.pack("<Q", length) + raw[8:]


def huge_numbers(file: File, random: Random) -> bytes:
    """Shapes and places that are negative, huge or no numbers."""
    raw = file.raw()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    entry = header[random.choice(list(file.columns))]
    number = random.choice((-1, 2**31, 2**63, 10**30, 1.5, "9", None, [1]))
    entry[random.choice(("shape", "data_offsets"))] = random.choice(([number], [number, number], [0, number], number))
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + raw[8 + length :]


def swapped(file: File, random: Random) -> bytes:
    """Two columns, each under the other's name."""
    one, two = random.sample(list(file.columns), 2)
    file.columns[one], file.columns[two] = file.columns[two], file.columns[one]
    return file.raw()


def other_types(file: File, random: Random) -> bytes:
    """A column of another precision or kind."""
    name = random.choice(list(file.columns))
    column = file.columns[name]
    with np.errstate(all="ignore"):
        file.columns[name] = column.astype(random.choice([kind for kind in TYPES if kind != column.dtype.name]))
    return file.raw()


def other_shapes(file: File, random: Random) -> bytes:
    """A column that is shorter, longer, empty, or no list."""
    name = random.choice(list(file.columns))
    column = file.columns[name]
    file.columns[name] = random.choice(
        (column[:-1], column[:0], np.append(column, column[:1]), column[None], column[:1].reshape(()))
    )
    return file.raw()


def other_columns(file: File, random: Random) -> bytes:
    """A column that is gone, or one too many."""
    if random.random() < 0.6:
        del file.columns[random.choice(list(file.columns))]
    else:
        file.columns[random.choice(("extra", "baseline", "", "weight ", "a" * 10_000))] = np.zeros(random.randrange(9))
    return file.raw()


def other_numbers(file: File, random: Random) -> bytes:
    """A kind, layer, position, feature or end of an edge out of range, or another one."""
    column = file.columns[random.choice(("kind", "layer", "pos", "feature", "source", "target"))]
    values = (-1, -2, -(2**63), 2**63 - 1, 2**31, 7, 1 << 15, len(KINDS), random.randrange(100), len(column))
    column[random.randrange(len(column))] = random.choice(values)
    return file.raw()


def other_values(file: File, random: Random) -> bytes:
    """NaN, infinities, and numbers that no model has."""
    column = file.columns[random.choice(("activation", "score", "influence", "weight", "effect", "total"))]
    column[random.randrange(len(column))] = random.choice((np.nan, np.inf, -np.inf, 1e300, -1.0, 1e38, 5e-324, 0.0))
    return file.raw()


def doubled(file: File, random: Random) -> bytes:
    """A node or an edge that is there twice."""
    names = random.choice((("kind", "layer", "pos", "feature"), ("source", "target")))
    one, two = random.sample(range(len(file.columns[names[0]])), 2)
    for name in names:
        file.columns[name][one] = file.columns[name][two]
    return file.raw()


def turned(file: File, random: Random) -> bytes:
    """An edge the other way round."""
    edge = random.randrange(len(file.columns["source"]))
    source, target = file.columns["source"], file.columns["target"]
    source[edge], target[edge] = target[edge], source[edge]
    return file.raw()


def other_facts(file: File, random: Random) -> bytes:
    """A fact of another type, or without its place."""
    place: Any = file.head if random.random() < 0.05 else file.head["meta"]
    while True:
        key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
        deeper = place[key]
        if not isinstance(deeper, dict | list) or not deeper or random.random() < 0.4:
            break
        place = deeper
    if isinstance(place, dict) and random.random() < 0.3:
        del place[key]
    else:
        place[key] = random.choice(ODD)
    return file.raw()


def broken_text(file: File, random: Random) -> bytes:
    """Facts that are no JSON, or too deep, too long or too many."""
    text = json.dumps(file.head)
    at = random.randrange(len(text))
    version, meta = '"version": 1', '"meta": {'
    many = ", ".join(["[]"] * 3_000_000)
    return file.raw(
        random.choice(
            (
                text[:at],
                text[:at] + random.choice('{}[],:"\\\x00') + text[at:],
                "[" * 200_000,
                '{"a":' * 100_000,
                random.choice(("", "null", "[]")),
                text.replace(version, f'"version": {"9" * 5000}'),
                text.replace(version, '"version": true'),
                text.replace(version, f'{version}, "a": [{many}]'),
                text.replace(meta, f'{meta}"prompt": "{chr(0x1F600) * 100_000}", '),
                text.replace(meta, f'{meta}"note": {"[" * 50}{"]" * 50}, '),
                text.replace(meta, f'{meta}"note": NaN, '),
            )
        )
    )


DAMAGES: tuple[Callable[[File, Random], bytes], ...] = (
    flipped, flipped_header, cut, claims, huge_numbers, swapped, other_types, other_shapes, other_columns,
    other_numbers, other_values, doubled, turned, other_facts, other_facts, broken_text,
)  # fmt: skip


# ---- what must hold


def write_graph(path: Path) -> None:
    """A graph of the embedded model, verified and pruned, as `circuits trace` writes it."""
    graph = trace(HookedModel.load("demo"), PROMPT, max_nodes=60, sample=12)
    graph.with_meta(labels={graph.names[-1]: "a $label$"}).save(path)


def damage(path: Path, number: int, seed: int = 0) -> tuple[str, bytes]:
    """The name of a damage and the bytes of the file it makes, the same for a number and a seed."""
    way = DAMAGES[number % len(DAMAGES)]
    return way.__name__, way(File(path), Random(f"{seed} {number}"))


def fate(path: Path, folder: Path, formats: Collection[str]) -> str:
    """The result of loading a file: refused, or loaded and written in these formats.

    Raises:
        Exception: anything but a UserError, which is a fault.
    """
    try:
        graph = Graph.load(path)
    except UserError:
        return "refused"
    check_graph(graph)
    repr(graph), graph._repr_html_(), graph.edges_frame()
    for kind in formats:
        out = folder / f"out.{'svg' if kind == 'scatter' else kind}"
        try:
            export(graph, out, kind)
        except UserError:
            if kind != "scatter":  # there is nothing to draw where nothing was verified
                raise
            continue
        if kind == "json":
            json.loads(out.read_text(), parse_constant=_no_number)
    return "loaded"


def _no_number(name: str) -> None:
    raise ValueError(f"bare {name} in JSON")


def bounded(path: Path, folder: Path, formats: Collection[str] = tuple(EXPORTERS)) -> tuple[str, str, float]:
    """The fate of a file, and what was wrong: a foreign exception, or too much memory; seconds it took to load."""
    before, began = resident(anew=True), time.process_time()
    try:
        with contextlib.suppress(UserError):
            Graph.load(path)
        seconds, grown = time.process_time() - began, resident() - before
        found = fate(path, folder, formats)
    except Exception:
        return "fault", traceback.format_exc(), 0.0
    if grown > MEMORY + TIMES * path.stat().st_size:
        return found, f"{grown:,} bytes for a file of {path.stat().st_size:,}", seconds
    return found, "", seconds


def resident(*, anew: bool = False) -> int:
    """The most bytes this process has had resident, since it was last asked for `anew`."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if anew:
        gc.collect()
        refs.write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) << 10


def by_command(path: Path, folder: Path) -> str:
    """What is wrong with `circuits export` on a file: any exit status but 0 and 2."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            status = circuits(
                ["export", str(path), "--format", "json", "--out", str(folder / "command.json"), "--json"]
            )
    except Exception:
        return traceback.format_exc()
    return "" if status in (0, 2) else f"exit status {status}: {heard.getvalue()}"


def main() -> int:
    """Damage, load, export; one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object, which is what is printed in any case")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fates: dict[str, dict[str, int]] = {}
    faults: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good, bad = folder / "good.safetensors", folder / "bad.safetensors"
        write_graph(good)
        slowest = 0.0
        for number in range(args.count):
            kind, raw = damage(good, number, args.seed)
            bad.write_bytes(raw)
            del raw
            found, fault, seconds = bounded(bad, folder)
            slowest = max(slowest, seconds)
            fault = fault or (f"{seconds:.1f} s" if seconds > SECONDS else "")
            fault = fault or by_command(bad, folder)
            fates.setdefault(kind, {}).setdefault(found, 0)
            fates[kind][found] += 1
            faults += [{"number": str(number), "damage": kind, "fault": fault}] if fault else []
    result = {"count": args.count, "failed": len(faults), "slowest_s": slowest, "fates": fates, "faults": faults[:20]}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
