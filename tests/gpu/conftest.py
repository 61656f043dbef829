"""What the tests on a GPU share.

`SQAKD_GPU_TESTS=cpu` runs their bodies on the CPU, on smaller tensors: that is how they are checked where there is no
GPU.
"""

import contextlib
import os

import pytest
import torch

from sqakd_hf.quantization import functional


# cuBLAS sums in the same order each time; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = os.environ.get("SQAKD_GPU_TESTS", "cuda")
_NOTED = "noted"


@pytest.fixture
def device() -> torch.device:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; SQAKD_GPU_TESTS=cpu runs it on the CPU")
    return torch.device(DEVICE)


@pytest.fixture
def on_gpu(device) -> bool:
    return device.type == "cuda"


@pytest.fixture
def compiled(monkeypatch):
    """Let the kernels compile, from a clean record, and fail if they did not."""
    monkeypatch.setattr(functional, "_compiler_failures", [])
    yield
    assert functional._compiler_failures == []


@pytest.fixture
def eagerly(monkeypatch):
    """Function that makes a context in which quantizers run without a compiled kernel."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(functional, "_compiler_failures", ["asked for"])
            yield

    return context


@pytest.fixture
def exact():
    """Let float32 products be of float32, not of TF32, which is torch's default for convolutions."""
    backends = (torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")
    before = [getattr(*each) for each in backends]
    for each in backends:
        setattr(*each, False)
    try:
        yield
    finally:
        for each, value in zip(backends, before, strict=True):
            setattr(*each, value)


@pytest.fixture
def repeatable(exact):
    """Let a GPU compute the same bits each time."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def options(device):
    """Training arguments for that device."""
    return {"use_cpu": device.type == "cpu", "max_steps": 4, "logging_steps": 1}


@pytest.fixture
def note(record_property):
    """Function that has a line printed at the end of the run, whatever the outcome."""
    return lambda line: record_property(_NOTED, line)


def pytest_terminal_summary(terminalreporter):
    lines = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == _NOTED
    ]
    if lines:
        terminalreporter.section("noted")
        for line in lines:
            terminalreporter.line(line)
