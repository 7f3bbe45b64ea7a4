"""What `make docs` adds to the pages. Broken links are found by the build itself."""

import importlib.util
import json
from pathlib import Path

import griffe
import pytest
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "_site.py")
assert spec
assert spec.loader
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

CODE = '''
class Base:
    """Has a docstring."""

    def inherited(self): ...

class Shown(Base):
    """Has one, too."""

    def method(self): ...

    @property
    def value(self):
        """Has one."""

    def _private(self): ...

NUMBER = 1
NAMED = 2
"""Has one."""
'''


def test_public_things_without_a_docstring_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(site.PACKAGES, "code", "")
    with griffe.temporary_visited_package("code", {"__init__.py": CODE}) as module:
        assert set(site.undocumented(module["Shown"])) == {"code.Shown.method", "code.Shown.inherited"}
        assert list(site.undocumented(module["NUMBER"])) == ["code.NUMBER"]
        assert list(site.undocumented(module["NAMED"])) == []


@pytest.mark.parametrize("package", list(site.PACKAGES))
def test_a_reference_has_every_public_name(package: str):
    names = importlib.import_module(package).names_
    page = site.reference(package, "heading")
    for name, place in names.items():
        assert (f"::: {place}.{name}\n" in page) == (name != "__version__")


def test_a_missing_docstring_stops_the_build(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site, "undocumented", lambda found: [found.path] if found.name == "Ablate" else [])
    with pytest.raises(PluginError, match=r"without a docstring: hooks\.interventions\.ablate\.Ablate$"):
        site.reference("hooks", "heading")


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[page](../docs/graphs.md), [next](02_more.ipynb)"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"data": {"image/png": "AAAA", "text/plain": ["<Figure>"]}},
                {"data": {"text/html": ["<style>b</style>\n\n<table>\n  <td>2</td>\n</table>"], "text/plain": ["2"]}},
            ],
        },
    ]
    path = tmp_path / "01_some.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    text, pictures = site.notebook(path)
    assert pictures == {"01_some_0.png": b"\0\0\0"}
    assert "[page](../graphs.md), [next](02_more.md)" in text
    assert "```python\nprint(1)\n```" in text
    assert "```text\n1\n```" in text
    assert '<div class="table-frame"><table><td>2</td></table></div>' in text


def test_the_command_line_has_every_command():
    page = site.command_line()
    for path in (ROOT / "circuits" / "commands").glob("[a-z]*.py"):
        assert f"## circuits {path.stem}\n" in page
