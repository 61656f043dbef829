import platform
import subprocess
import sys

import pytest


pytestmark = pytest.mark.process

# Page faults of forty tensors of 32 MiB, one after the other.
COUNT = """
import resource
import torch
{prepare}
faults = []
for _ in range(40):
    torch.ones(2**23)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[4])
"""
PREPARE = "from sqakd_hf.cli.allocator import keep_freed_memory; keep_freed_memory()"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_tensors_take_the_pages_of_those_that_were_freed():
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", COUNT.format(prepare=prepare)], capture_output=True, check=True
            ).stdout
        )
        for prepare in ("", PREPARE)
    ]
    assert faults[1] < faults[0] / 10
