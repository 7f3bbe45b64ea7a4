"""Writes the lock files anew: the newest version of every dependency within pyproject.toml's bounds, with hashes.

    make upgrade                      # keeps the pin of torch
    make upgrade TORCH=torch==2.14.0  # raises it, too

| file | what is in it | installed by |
|---|---|---|
| `torch.txt` | torch alone, without hashes: its builds differ by machine | `make demo`, `make test` |
| `build.txt` | what builds a package from source | both |
| `demo.txt` | the package and the extra `plot` | `make demo` |
| `all.txt` | every extra and the groups `dev` and `docs` | `make test` |

pip's own resolver chooses, by way of pip-tools, and sees the pin of torch as a bound. What a build of torch brings
along for its device (`nvidia-*`, `triton`) is left to torch, which names exact versions of it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).resolve().parent
# needed on other systems than the one this runs on; a resolver sees only its own
ELSEWHERE = {
    "appnope": 'platform_system == "Darwin"',
    "colorama": 'platform_system == "Windows"',
    "tzdata": 'platform_system == "Windows"',
}
HEAD = "# written by `make upgrade`\n"
OF_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def wanted(project: dict[str, Any], extras: Iterable[str], groups: Iterable[str]) -> list[str]:
    """What pyproject.toml asks for; the extra that names other extras is left away."""
    optional = project["project"]["optional-dependencies"]
    found = list(project["project"]["dependencies"])
    for extra in extras:
        found += [each for each in optional[extra] if not each.startswith(project["project"]["name"])]
    for group in groups:
        found += project["dependency-groups"][group]
    return found


def blocks(lock: str) -> dict[str, str]:
    """Name → everything a lock file says about that package."""
    texts = re.findall(r"(?m)^[a-z0-9].*(?:\n[ \t]+.*)*", lock)
    return {text.split("==")[0]: text + "\n" for text in texts}


def portable(lock: str) -> str:
    """A resolver's answer without torch and what belongs to one build of it; packages of other systems get a marker."""
    kept = {name: text for name, text in blocks(lock).items() if not OF_TORCH.match(name)}
    for name in ELSEWHERE.keys() & kept.keys():
        if not kept[name].endswith("# via pyproject.toml\n"):  # something needs it here, too
            continue
        kept[name] = kept[name].replace(" \\\n", f" ; {ELSEWHERE[name]} \\\n", 1)
    return HEAD + "".join(kept.values())


def part(lock: str, names: Iterable[str]) -> str:
    """Those packages of a lock and all that they need, which is said from behind: `# via` names who needs a package."""
    every, kept = blocks(lock), {re.split(r"[^\w.-]", name)[0].lower() for name in names}
    needed_by = {name: set(re.findall(r"[\w.-]+", text.split("# via ")[-1])) for name, text in every.items()}
    while more := {name for name in every.keys() - kept if needed_by[name] & kept}:
        kept |= more
    return HEAD + "".join(text for name, text in every.items() if name in kept)


def resolve(needs: Iterable[str]) -> str:
    """What pip-tools makes of requirements: every package, at one version, with the hashes of all its files."""
    with tempfile.TemporaryDirectory() as folder:
        entry, out = Path(folder, "requirements.in"), Path(folder, "lock.txt")
        entry.write_text("\n".join(needs) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "piptools", "compile", "--quiet", "--generate-hashes", "--allow-unsafe"]
        command += ["--strip-extras", "--no-header", "--no-emit-options", "--no-config", "--annotation-style", "line"]
        command += [f"--constraint={LOCKS / 'torch.txt'}", "--output-file", str(out), str(entry)]
        subprocess.run(command, check=True)
        # names of temporary files would make every run another text
        return re.sub(r"-r \S*requirements\.in", "pyproject.toml", out.read_text(encoding="utf-8"))


def main() -> None:
    """Resolve everything together; the smaller sets are parts of it, so that versions agree."""
    parser = argparse.ArgumentParser(description="Write the lock files anew.")
    parser.add_argument("--torch", default="", help="the pin, like torch==2.13.0; the present one stays otherwise")
    pin = re.match(r"torch==\d+(\.\d+)*", parser.parse_args().torch)
    project = tomllib.loads((LOCKS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = project["project"]["requires-python"].removeprefix(">=")
    if oldest != "{}.{}".format(*sys.version_info):
        sys.exit(f"the lock is made on Python {oldest}, the oldest that is supported; this is {sys.version.split()[0]}")
    if pin:
        (LOCKS / "torch.txt").write_text(pin[0] + "\n", encoding="utf-8")
    build, extras = project["build-system"]["requires"], project["project"]["optional-dependencies"]
    needs = [*build, *wanted(project, extras, project["dependency-groups"]), *ELSEWHERE]
    lock = portable(resolve(needs))
    demo = part(lock, [*build, *wanted(project, ["plot"], []), "colorama", "tzdata"])
    for name, text in {"all": lock, "demo": demo, "build": part(lock, build)}.items():
        (LOCKS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"locks/{name}.txt: {len(blocks(text))} packages")


if __name__ == "__main__":
    main()
