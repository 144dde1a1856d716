"""A small part of `make fuzz`, in a process of its own because its memory is limited."""

import subprocess
import sys
from pathlib import Path


def test_two_thousand_cases() -> None:
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / "run.py"), "--cases", "2000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fuzz: 2,000 cases from seed 1, ")
    assert ", 0 failures; " in done.stdout
