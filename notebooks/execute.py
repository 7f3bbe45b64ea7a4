"""Run every notebook of this folder in a fresh kernel of this interpreter, and fail at the first cell that fails.

    python notebooks/execute.py             run, change no file (so does --check)
    python notebooks/execute.py --write     run, and store the outputs and pictures

No kernel has to be installed and nothing is written outside temporary folders. What is stored carries no times, paths
or versions, so running again changes only outputs that really differ.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TIMEOUT = 300  # seconds per cell


def main() -> int:
    """Run the notebooks; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the notebooks of this folder.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="run without changing a file (the default)")
    mode.add_argument("--write", action="store_true", help="run and store the outputs")
    args = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        try:
            asyncio.run(execute(notebook))
        except CellExecutionError as error:
            print(f"{path.name} failed:\n{error}", file=sys.stderr)
            return 1
        if args.write:
            write(notebook, path)
        print(f"{path.name}: {'stored' if args.write else 'runs'}")
    return 0


async def execute(notebook: Any) -> None:
    """Run all cells in a kernel of this interpreter, in a temporary folder.

    Raises:
        CellExecutionError: a cell failed; the message shows the cell and its error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(_kernel_spec(folder))]),
            connection_file=str(folder / "connection.json"),
            transport="ipc" if os.name == "posix" else "tcp",  # sockets in the same folder, no ports
            ip=str(folder / "kernel") if os.name == "posix" else "127.0.0.1",
        )
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=TIMEOUT,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(_made(folder / "work"))}},
        )
        try:
            await client.async_execute()
        finally:
            if kernel.has_kernel:
                await kernel.shutdown_kernel(now=True)


def _kernel_spec(folder: Path) -> Path:
    """A kernel of this interpreter that imports the repository, reaches no network and shows no progress bars."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    spec = {
        **{key: KERNEL[key] for key in ("display_name", "language")},
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "env": {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "IPYTHONDIR": str(_made(folder / "ipython")),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm misses ipywidgets; the warning shows a path
        },
    }
    path = _made(folder / "kernels" / "python3") / "kernel.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return folder / "kernels"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(notebook: Any, path: Path) -> None:
    """Store a notebook with fixed metadata; sources, outputs and pictures as they are."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    nbformat.validate(notebook)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
