"""Trainings in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(script: str, folder: Path, processes: int, **options) -> subprocess.CompletedProcess:
    """Run a script of tests/helpers in so many processes."""
    folder.mkdir()
    launcher = [*LAUNCHER, str(processes)] if processes > 1 else [sys.executable]
    return subprocess.run(
        [*launcher, "-m", script, str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def run(folder: Path, processes: int, **options) -> list[dict]:
    """Run tests/helpers/distributed_run.py; return what each process left."""
    done = launch("tests.helpers.distributed_run", folder, processes, **{"steps": 20, **options})
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
