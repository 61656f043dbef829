"""Training by `SQAKDTrainer`, in every precision and with every option that changes what a GPU does."""

import copy
import math

import pytest
import torch

from sqakd_hf.distillation.nan_diagnostics import FiniteWatch, NonFiniteError
from sqakd_hf.quantization.quantizers import FakeQuantizer
from tests.helpers.models import TinyConvNet, tiny_vit
from tests.helpers.training import Break, assert_same_state, make_trainer, whole_and_resumed


pytestmark = pytest.mark.gpu

OPTIONS = {
    "float32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "compiled": {"torch_compile": True, "bf16": True},
    "low memory": {"activation_memory": "low", "bf16": True},
    "channels last": {"channels_last": True, "bf16": True},
    "checkpointed": {"gradient_checkpointing": True, "bf16": True},
    "gathered": {"gradient_accumulation_steps": 2, "bf16": True},
    "fused optimizer": {"optim": "adamw_torch_fused", "fp16": True},
}


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("build", [TinyConvNet, tiny_vit])
def test_a_student_trains(build, case, device, options, compiled, tmp_path, note):
    if device.type == "cpu" and "fp16" in OPTIONS[case]:
        pytest.skip("float16 trains on GPUs alone")
    if build is TinyConvNet and case == "checkpointed":
        pytest.skip("modules of torch have no gradient checkpointing")
    if device.type == "cpu" and build is tiny_vit and case == "compiled":
        pytest.skip("half a minute on a CPU, where test_step.py compiles it")
    own = dict(OPTIONS[case])
    if device.type == "cpu" and "torch_compile" in own:
        own["torch_compile_backend"] = "aot_eager"  # the graph is in question there, and the C++ compiler is slow
    trainer = make_trainer(tmp_path, build, config={"quantizer": "ewgs"}, **{**options, **own})
    trainer.calibrate()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()

    model = trainer.model
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            assert all(tensor.dtype == torch.float32 for tensor in module.range_tensors().values())
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(losses(trainer)) == options["max_steps"] and all(map(math.isfinite, losses(trainer)))
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    note(f"{build.__name__}, {case}: losses {losses(trainer)}")


@pytest.mark.parametrize("build", [TinyConvNet, tiny_vit])
def test_the_first_losses_are_the_cpus(build, device, options, exact, compiled, tmp_path):
    found, expected = (
        make_trainer(tmp_path / name, build, **{**options, "use_cpu": use_cpu, "max_steps": 2})
        for name, use_cpu in (("device", device.type == "cpu"), ("cpu", True))
    )
    for trainer in (found, expected):
        trainer.train()
    # A code or two may be others, and these losses are small.
    assert losses(found) == pytest.approx(losses(expected), rel=0.1, abs=1e-4)


@pytest.mark.parametrize("option", [{"activation_memory": "low"}, {"gradient_checkpointing": True}], ids=str)
def test_what_saves_memory_trains_the_same_bits(option, device, options, repeatable, compiled, tmp_path):
    plain, saving = (
        make_trainer(tmp_path / name, tiny_vit, **{**options, **own})
        for name, own in (("plain", {}), ("saving", option))
    )
    for trainer in (plain, saving):
        trainer.train()
    assert_same_state(saving.model, plain.model)


def test_a_resumed_run_equals_an_uninterrupted_one(device, options, repeatable, compiled, tmp_path):
    whole, resumed = whole_and_resumed(tmp_path, build=tiny_vit, **{**options, "max_steps": 6, "bf16": True})
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_same_state(resumed.model, whole.model)


def test_a_cached_teacher_is_the_one_that_runs(device, options, exact, compiled, tmp_path):
    found = []
    for cache in (None, str(tmp_path / "logits")):
        trainer = make_trainer(tmp_path, tiny_vit, **{**options, "cache_teacher_logits": cache})
        trainer.train_dataset.fingerprint = "noise"
        trainer.train()
        found.append(losses(trainer))
    # The cache computes in batches of another size.
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=1e-4)


def test_a_student_that_is_no_number_any_more_is_noticed_where_losses_are_logged(
    device, options, compiled, tmp_path, monkeypatch
):
    monkeypatch.setattr(FiniteWatch, "looks_at_each_step", False)  # as on a GPU, also where this runs on a CPU
    trainer = make_trainer(tmp_path, tiny_vit, callbacks=[Break("classifier.bias")], **options)
    with pytest.raises(NonFiniteError, match="some time since the last log"):
        trainer.train()
