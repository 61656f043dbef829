"""What a step does not do on a GPU: wait for it, and compile anew."""

import collections
import contextlib
import os
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from sqakd_hf.distillation.nan_diagnostics import FiniteWatch
from tests.helpers.models import TinyConvNet, tiny_vit
from tests.helpers.synchronization import no_waiting, train_within
from tests.helpers.training import make_trainer


pytestmark = pytest.mark.gpu

CASES = {
    "float32": {},
    "bf16": {"bf16": True, "config": {"quantizer": "ewgs"}},
    "low memory": {"bf16": True, "activation_memory": "low"},
    "gathered": {"gradient_accumulation_steps": 2},
    "channels last": {"channels_last": True, "bf16": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", [TinyConvNet, tiny_vit])
def test_a_step_never_waits(build, case, device, options, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(FiniteWatch, "looks_at_each_step", False)
    trainer = make_trainer(tmp_path, build, **{**options, **CASES[case]})
    train_within(trainer, lambda: no_waiting(device, monkeypatch))


@pytest.mark.parametrize("build", [TinyConvNet, tiny_vit])
def test_nothing_is_compiled_after_the_first_steps(build, device, options, compiled, tmp_path):
    graphs = []

    @contextlib.contextmanager
    def counted():
        before = counters["stats"]["unique_graphs"]
        yield
        graphs.append(counters["stats"]["unique_graphs"] - before)

    # 24 images in batches of 7: the last of an epoch has 3, which is a second size.
    own = {"max_steps": 12, "per_device_train_batch_size": 7, "bf16": True}
    train_within(make_trainer(tmp_path, build, **{**options, **own}), counted)
    assert len(graphs) == 11
    assert not any(graphs[4:])


def test_what_waits_in_a_whole_training_is_listed(device, on_gpu, options, compiled, tmp_path, note):
    if not on_gpu:
        pytest.skip("torch names what waits for a GPU alone")
    trainer = make_trainer(tmp_path, TinyConvNet, **{**options, "bf16": True, "logging_steps": 4})
    trainer.calibrate()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = collections.Counter(
        f"{os.sep.join(each.filename.split(os.sep)[-2:])}:{each.lineno}"
        for each in caught
        if "synchronizing" in str(each.message)
    )
    for place, count in places.most_common(20):
        note(f"waits in {options['max_steps']} steps: {count} x {place}")
