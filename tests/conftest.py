"""Seeded models and images that the tests share."""

import os


# Before any import of the Hub's client: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# MKL sums in an order that depends on where its inputs lie in memory, unless it is told not to: two students that are
# equal to the last bit would differ by chance.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the other cores have workers of their own

import pytest
import torch
from transformers import PreTrainedModel

from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit


@pytest.fixture
def conv_net() -> TinyConvNet:
    torch.manual_seed(0)
    return TinyConvNet().eval()


@pytest.fixture
def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_vit().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(12, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def freed_memory_goes_back():
    """The command tells the C library to keep what is freed; a process that runs other tests after it shall not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqakd_hf.cli.distill.keep_freed_memory", lambda: None)
        yield
