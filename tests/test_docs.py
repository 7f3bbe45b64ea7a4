"""Everything the pages say is run: code blocks, links, options, messages, axis names, the notebook.

Fences: ```python and ```bash (or ```sh) blocks of a page run in order, in one temporary folder; Python blocks share a
namespace. `no-run` behind the language: only checked, never run. `file=PATH`: a plug-in file, put where its package
finds it for the rest of the page. Lines with `git clone`, `cd`, `make` or `pip install` are never run.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import circuits
import hooks
from circuits import cli
from hooks import errors
from hooks.plugins import discover

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]
REGISTRIES = {
    "hooks.interventions": ("INTERVENTIONS", ("Intervention", "from_text")),
    "hooks.formats": ("FORMATS", ("matches", "locate")),
    "circuits.export": ("EXPORTERS", ("write",)),
    "circuits.attribution": ("RULES", ("CONSERVES", "edge_rows")),
}
NOT_RUN = re.compile(r"(git clone|cd|make|(\S*python3? -m )?pip install)\b")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int  # of its first line of code
    language: str
    options: tuple[str, ...]
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return "no-run" not in self.options

    @property
    def file(self) -> str | None:
        return next((option.removeprefix("file=") for option in self.options if option.startswith("file=")), None)


def blocks_of(page: Path) -> Iterator[Block]:
    fence, first, code = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not fence and line.startswith("```"):
            fence, first, code = line[3:].strip() or "text", number + 1, []
        elif fence and line.rstrip() == "```":
            language, *options = fence.split()
            yield Block(page, first, language, tuple(options), "\n".join(code) + "\n")
            fence = ""
        elif fence:
            code.append(line)
    assert not fence, f"{page.name}:{first}: this block is never closed"


BLOCKS = {page: list(blocks_of(page)) for page in PAGES}
PROSE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def page_id(page: Path) -> str:
    return page.name


def commands_in(code: str) -> list[str]:
    """The command lines of a shell block, continuation lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


# -- code blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: "Plugins"):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in BLOCKS[page]:
        if not block.runs:
            continue
        if block.language == "python":
            run_python(block, namespace, plugins)
        elif block.language in ("bash", "sh"):
            run_shell(block)


def run_python(block: Block, namespace: dict[str, object], plugins: "Plugins") -> None:
    try:
        if block.file:
            plugins.add(block.file, block.code)
        else:
            # empty lines in front: a traceback then shows the line of the page
            exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)
    except Exception as error:
        raise AssertionError(f"{block.place}: {type(error).__name__}: {error}\n\n{block.code}") from error


def run_shell(block: Block) -> None:
    """Our own commands in this process, which has imported everything; the others in a shell, line by line."""
    for command in commands_in(block.code):
        if NOT_RUN.match(command):
            continue
        if command.startswith("circuits ") and not re.search(r"[|<>&;$`]", command):
            run_command(command, block)
        else:
            run_in_bash(command, block)


def run_command(command: str, block: Block) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = cli.main(shlex.split(command, comments=True)[1:])
        except SystemExit as stop:
            status = int(stop.code or 0)
    assert status == 0, f"{block.place}: exit status {status}\n\n{command}\n{said.getvalue()[-3000:]}"


def run_in_bash(script: str, block: Block) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{block.place}: exit status {done.returncode}\n\n{block.code}\n{done.stderr[-3000:]}"


class Plugins:
    """Plug-in files that packages find as long as the test runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._folder, self._monkeypatch, self.added = folder, monkeypatch, list[str]()

    def add(self, path: str, code: str) -> None:
        file = self._folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")
        name = ".".join(file.parent.relative_to(self._folder).parts)
        registry, contract = REGISTRIES[name]
        package = importlib.import_module(name)
        assert file.stem not in getattr(package, registry), f"{path} exists already"
        self._monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
        importlib.invalidate_caches()
        self.added.append(f"{name}.{file.stem}")
        found = discover(name, contract)
        self._monkeypatch.setitem(getattr(package, registry), file.stem, found[file.stem])


@pytest.fixture
def plugins(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    plugins = Plugins(tmp_path_factory.mktemp("plugins"), monkeypatch)
    yield plugins
    for name in plugins.added:
        sys.modules.pop(name, None)
        package, _, stem = name.rpartition(".")
        sys.modules[package].__dict__.pop(stem, None)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_that_are_not_run_are_right(page: Path):
    for block in BLOCKS[page]:
        if block.language == "python" and not block.runs:
            compile(block.code, block.place, "exec")
        if block.language not in ("bash", "sh"):
            continue
        for command in commands_in(block.code):
            if not block.runs and command.startswith("circuits "):
                check_command(command, block.place)
            if command.startswith("make"):
                check_make(command, block.place)


def check_command(command: str, place: str) -> None:
    said, status = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.build_parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit as stop:
            status = stop.code
    assert status == 0, f"{place}: {command}\n{said.getvalue()}"


def check_make(command: str, place: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-zA-Z][\w-]*):(?!=)", text, re.MULTILINE))
    words = shlex.split(command, comments=True)[1:]
    wanted = [word for word in words if re.fullmatch(r"[a-zA-Z][\w-]*", word)]
    assert set(wanted) <= known, f"{place}: `{command}`: the Makefile has {', '.join(sorted(known))}"


def taught() -> Iterator[tuple[str, str]]:
    """(place, code) of all Python that readers are shown; a page on plug-ins shows files of rooms."""
    for page in PAGES:
        if page.name != "extending.md":
            yield from ((block.place, block.code) for block in BLOCKS[page] if block.language == "python")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield from ((path.name, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")


def test_imports_that_are_taught_are_exported():
    """`from hooks import …`, `from circuits import …`: a public name, or a whole room."""
    given = {package.__name__: {*package.__all__} for package in (hooks, circuits)}
    for package, known in given.items():
        known |= {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    seen = 0
    for place, code in taught():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.partition(".")[0] in given], place
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in given:
                assert node.module in given, f"{place}: from {node.module} import …"
                assert {alias.name for alias in node.names} <= given[node.module], place
                seen += 1
    assert seen > 40


def test_pages_have_blocks_of_known_languages():
    for page in PAGES:
        for block in BLOCKS[page]:
            assert block.language in ("bash", "sh", "python", "text", "json"), f"{block.place}: {block.language}"
            unknown = [option for option in block.options if option != "no-run" and not option.startswith("file=")]
            assert not unknown, f"{block.place}: unknown fence option {unknown}"


# -- what the pages mention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_point_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link} points to no file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}: {target.name} has {', '.join(anchors(target))}"


def anchors(page: Path) -> list[str]:
    """The anchors GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", [*hooks.__all__, *circuits.__all__])
def test_public_names_are_documented(name: str):
    assert re.search(rf"\b{name}\b", PROSE), f"{name} is on no page"


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = cli.build_parser()._actions
    return next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices


@pytest.mark.parametrize("command", list(subcommands()))
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    parser = subcommands()[command]
    for action in parser._actions:
        if not action.option_strings:
            continue
        assert action.help, f"{command} {action.option_strings[0]} has no help"
        text = parser._get_formatter()._expand_help(action)
        assert "".join(text.split()) in shown, f"{command} {action.option_strings[0]}: {text}"
        assert action.option_strings[-1] in shown


@pytest.mark.parametrize("command", list(subcommands()))
def test_every_command_is_on_a_page(command: str):
    assert re.search(rf"circuits {command}\b", PROSE) or command == "demo", f"no page mentions `circuits {command}`"


# -- messages and axes ---------------------------------------------------------------------------------------------


FAMILIES = [
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.UserError)
]


def sources() -> list[Path]:
    return sorted(path for package in ("hooks", "circuits") for path in (ROOT / package).rglob("*.py"))


def raised() -> list[tuple[str, str, str]]:
    """(family, pattern of the first line, place) of every message in the product."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            name = getattr(node.exc.func, "id", "")
            if name in FAMILIES:
                found.append((name, pattern_of(node.exc.args[0]), f"{path.relative_to(ROOT)}:{node.lineno}"))
    return found


def pattern_of(message: ast.expr) -> str:
    """A regular expression for an f-string: its text, and anything where it has a value."""
    if isinstance(message, ast.JoinedStr):
        return "".join(pattern_of(part) for part in message.values)
    if isinstance(message, ast.Constant):
        return re.escape(str(message.value))
    if isinstance(message, ast.FormattedValue) and isinstance(message.value, ast.IfExp):
        return pattern_of(message.value)
    if isinstance(message, ast.IfExp):
        return f"({pattern_of(message.body)}|{pattern_of(message.orelse)})"
    return "(.+)"


def quoted_messages() -> dict[str, list[str]]:
    """Per family, the first column of its tables in errors.md."""
    out: dict[str, list[str]] = {}
    family = ""
    for line in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            family = line[3:].strip()
        elif line.startswith("| `"):
            out.setdefault(family, []).append(re.sub(r"^`+ ?| ?`+$", "", line.split(" | ")[0][2:].strip()))
    return out


def test_every_error_family_has_a_section():
    assert set(FAMILIES) == set(quoted_messages())


def test_quoted_messages_are_real():
    for family, messages in quoted_messages().items():
        patterns = [pattern for name, pattern, _ in raised() if name == family]
        for message in messages:
            assert any(re.fullmatch(p, message) for p in patterns), f"docs/errors.md: {family} never says {message!r}"


def test_every_message_is_explained():
    quoted = quoted_messages()
    for family, pattern, place in raised():
        assert any(re.fullmatch(pattern, message) for message in quoted[family]), (
            f"{place}: this {family} is not in docs/errors.md: {pattern}"
        )


def test_axis_names_are_documented():
    table = (ROOT / "docs" / "dimensions.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    known = {name.strip(" `") for cell in cells for name in cell.split(",")}
    training = ROOT / "hooks" / "demo"
    for path in (path for path in sources() if training not in path.parents):
        for shape in re.findall(r'\b(?:Float|Int|Bool)\[[\w.]+, "([^"]*)"\]', path.read_text(encoding="utf-8")):
            for axis in re.sub(r"[*#]", "", shape).split():
                assert axis in known or axis.isdigit(), (
                    f"{path.relative_to(ROOT)}: axis {axis!r} is not in dimensions.md"
                )


# -- the notebook --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_notebooks_execute():
    script = ROOT / "notebooks" / "execute.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_notebooks_are_stored_with_their_pictures():
    import nbformat

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        outputs = [output for cell in code for output in cell.outputs]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
            f"{path.name}: not run in order"
        )
        assert any("image/png" in output.get("data", {}) for output in outputs), f"{path.name} shows no picture"
        assert not any(output.output_type == "error" for output in outputs)
        assert not any(output.get("name") == "stderr" for output in outputs), f"{path.name}: something on stderr"
