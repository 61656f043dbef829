"""What a training step would do to an accelerator, seen on a CPU: reads of numbers, and tensors of two devices."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sqakd_hf import create_quantizer, list_quantizers
from sqakd_hf.distillation.losses import distillation_loss
from sqakd_hf.distillation.nan_diagnostics import FiniteWatch
from sqakd_hf.outputs.forward import predict
from sqakd_hf.quantization import functional
from tests.helpers.models import TinyConvNet, tiny_vit
from tests.helpers.synchronization import counted_reads, train_within
from tests.helpers.training import make_trainer


CASES = {
    "plain": {},
    "bf16": {"bf16": True, "config": {"quantizer": "ewgs"}},
    "gathered from two batches": {"gradient_accumulation_steps": 2, "activation_memory": "low"},
    "oscillations": {"oscillation_dampening": 0.1, "oscillation_freezing": 0.1},
    "attention": {"build": tiny_vit, "config": {"attention_bits": 8}, "freeze_batch_norm": "auto"},
    "objective": {"objective": "ce + kl + at", "labelled": True},
}


class TestReads:
    @pytest.mark.parametrize("options", CASES.values(), ids=CASES)
    def test_a_step_reads_no_number_back(self, options, tmp_path, monkeypatch):
        # What a CPU looks at in each step, and an accelerator does not.
        monkeypatch.setattr(FiniteWatch, "looks_at_each_step", False)
        trainer = make_trainer(tmp_path, max_steps=3, **options)
        found = []
        train_within(trainer, lambda: counted_reads(monkeypatch, found))
        for extension in trainer.extensions:
            with counted_reads(monkeypatch, found):
                extension.on_optimizer_step(0.5)
        assert not found

    def test_a_step_on_a_cpu_reads_its_loss_and_the_norm_of_its_gradients(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, max_steps=2)
        found = []
        train_within(trainer, lambda: counted_reads(monkeypatch, found))
        assert [line.rpartition(" ")[2] for line in found] == ["check_loss", "check_gradients"]


class Crossings(TorchDispatchMode):
    """Note the operations that take tensors from one device to another."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors}
        if len(devices) > 1:
            self.found.append(f"{function}: {sorted(devices)}")
        return output


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of tensors without data; the engine of autograd needs a real one."""
    monkeypatch.setattr(functional, "_is_watched", lambda: False)
    monkeypatch.setattr(functional, "_compiler_failures", ["no kernel"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield lambda tensor: _on_gpu(mode, tensor)


def _on_gpu(mode, tensor):
    fake = mode.from_tensor(tensor.detach()).to("cuda")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class TestDevices:
    @pytest.mark.parametrize("build", [TinyConvNet, tiny_vit])
    def test_forward_teacher_and_loss_stay_on_the_gpu(self, build, tmp_path, gpu):
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            trainer = make_trainer(tmp_path, build, {"attention_bits": 8} if build is tiny_vit else {})
            trainer.calibrate()
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        student, teacher = trainer.model.train(), trainer.teacher.models[0]
        for model in (student, teacher):
            for module in model.modules():
                for table in (module._parameters, module._buffers):
                    table.update({name: gpu(tensor) for name, tensor in table.items() if tensor is not None})
        inputs = {name: gpu(tensor) for name, tensor in batch.items()}
        with Crossings() as crossings:
            loss = distillation_loss(predict(student, inputs).logits, predict(teacher, inputs).logits)
        assert loss.device.type == "cuda"
        assert not crossings.found

    @pytest.mark.parametrize("axis", [None, 1])
    @pytest.mark.parametrize("name", list_quantizers())
    def test_the_backward_of_a_quantizer_does(self, name, axis, gpu):
        for bits, role in ((1, "weight"), (4, "activation")):
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                quantizer = create_quantizer(name, bits=bits, role=role, channel_axis=axis)
                x = torch.randn(4, 6, 5)
                quantizer.init_range(x)
                grid = quantizer.grid()
            x, grid = gpu(x), [gpu(each) for each in grid]
            context = SimpleNamespace(
                saved_tensors=[x, *grid],
                options=(2**bits - 1, quantizer.delta, axis, quantizer.binary, quantizer.clip_only),
                needs_input_grad=(True, True, True),
            )
            with Crossings() as crossings, torch.no_grad():
                gradients = functional._FakeQuantize.backward.__wrapped__(context, torch.ones_like(x))
            assert {each.device.type for each in gradients if each is not None} == {"cuda"}
            assert not crossings.found
