"""What `make docs` adds to the pages of this folder: references of both packages and the command, the notebooks.

A public name without a docstring, and a public method without one, stop the build.
"""

import base64
import importlib
import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACKAGES = {
    "hooks": "What does the model do, and what if I change this?",
    "circuits": "Why does the model do it?",
}

RETURNED = {  # what public functions return, and nobody imports
    "hooks": (
        "hooks.model.Run",
        "hooks.passes.Recording",
        "hooks.effects.Sweep",
        "hooks.effects.Effects",
        "hooks.effects.PathEffect",
        "hooks.readout.Effect",
        "hooks.generation.Generated",
        "hooks.generation.Comparison",
        "hooks.generation.DoseResponse",
        "hooks.check.QualityReport",
        "hooks.check.Calibration",
        "hooks.checkpoints.Findings",
    ),
    "circuits": ("circuits.graph.NodeIndex", "circuits.faithfulness.Case", "circuits.faithfulness.Curve"),
}
FIRST = ("hooks.model", "circuits.tracing")  # what a reader looks for most


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for name, heading in PACKAGES.items():
        _add(files, config, f"reference/{name}.md", reference(name, heading))
    _add(files, config, "reference/command-line.md", command_line())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook(path)
        _add(files, config, f"notebooks/{path.stem}.md", text)
        for name, data in pictures.items():
            _add(files, config, f"notebooks/{name}", data)
    return files


def _add(files: Files, config: MkDocsConfig, path: str, content: str | bytes) -> None:
    files.append(File.generated(config, path, content=content))


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Adapt pages that are read in a repository, too: links to notebooks, links by a file's name, options of fences."""
    markdown = re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)
    markdown = re.sub(
        r"\[[\w/]+\.(?:md|ipynb)\]\(([^)#]+\.md)(#[^)]*)?\)", partial(_titled, page=page, files=files), markdown
    )
    markdown = re.sub(r"(?m)^```(\w+) .*?file=(\S+).*$", r'```\1 title="\2"', markdown)
    return re.sub(r"(?m)^```(\w+) no-run$", r"```\1", markdown)


def _titled(link: re.Match[str], page: Page, files: Files) -> str:
    """The link with the title of the page it leads to, instead of its file's name."""
    to = files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1])))
    title = re.match(r"# (.+)", to.content_string) if to else None
    return f"[{title[1]}]({link[1]}{link[2] or ''})" if title else link[0]


# -- references ----------------------------------------------------------------------------------------------------


def reference(package: str, heading: str) -> str:
    """One entry for every public name, by the folder that defines it."""
    names = importlib.import_module(package).names_
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    for each in PACKAGES:
        loader.load(each)
    paths = [f"{names[name]}.{name}" for name in sorted(names, key=str.lower) if not name.startswith("_")]
    entries = [loader.modules_collection[path] for path in (*paths, *RETURNED[package])]
    if missing := [path for each in entries for path in undocumented(each)]:
        raise PluginError(f"public, and without a docstring: {', '.join(missing)}")
    parts = [f"# {package}", f"{heading} `from {package} import …` gives all of these."]
    rooms = {".".join(path.split(".")[:2]) for path in paths}
    for room in sorted(rooms, key=lambda room: (room not in FIRST, room)):
        parts += [f"## {room}", *(entry(path) for path in paths if path.startswith(f"{room}."))]
    parts += ["## What they return", *map(entry, RETURNED[package])]
    return "\n\n".join(parts) + "\n"


def entry(path: str) -> str:
    """What mkdocstrings replaces by an object's signature and docstring; the model's class has methods of its bases."""
    return f"::: {path}\n    options:\n      inherited_members: {str(path.endswith('.HookedModel')).lower()}"


def undocumented(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    """The paths of public functions, classes, properties and constants that have no docstring."""
    if found.docstring is None:
        yield found.path
    if found.is_class:
        for name, member in found.all_members.items():
            shown = member.is_function or "property" in member.labels
            if shown and not name.startswith("_") and member.path.split(".")[0] in PACKAGES:
                yield from undocumented(member)


def command_line() -> str:
    """Every `--help`, as the command prints it at a width of 100."""
    code = """
import json, os
os.environ["COLUMNS"] = "100"
from circuits.options import build_parser
parser = build_parser()
chosen = next(action for action in parser._actions if action.choices).choices
print(json.dumps({"circuits": parser.format_help()} | {f"circuits {n}": p.format_help() for n, p in chosen.items()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    parts = ["# Command line"]
    for name, text in json.loads(done.stdout).items():
        parts += [f"## {name}", f"```text\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


# -- notebooks -----------------------------------------------------------------------------------------------------


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A stored notebook as a page, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source.replace("](../docs/", "](../")))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output]({name})")
            elif "text/html" in data:
                parts.append(f'<div class="table-frame">{_plain("".join(data["text/html"]))}</div>')
            else:
                text = "".join(output.get("text") or data["text/plain"]).rstrip()
                parts.append(f'<div class="output" markdown>\n\n```text\n{text}\n```\n\n</div>')
    return "\n\n".join(parts) + "\n", pictures


def _plain(html: str) -> str:
    """A table of pandas without its own style; an empty line would end the block of HTML."""
    return re.sub(r"\n\s*", "", re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)).replace(' border="1"', "")
