"""A twentieth of stress/kills.py: writers killed at any line leave whole files, and the next run tidies up."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_five_killed_writers() -> None:
    command = [sys.executable, str(ROOT / "stress" / "kills.py"), "--json", "--count", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["count"], found["failed"]) == (5, 0)
    assert found["killed"] > 0
