"""What a training step does not do: wait for the device, break the graph, compile anew, round by the precision."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sqakd_hf import (
    FakeQuantizer,
    QuantizationConfig,
    calibrate_model,
    create_quantizer,
    distillation_loss,
    list_quantizers,
    quantize_model,
)
from sqakd_hf.hub import paper_networks as sqakd_models
from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit
from tests.helpers.training import make_trainer


MODELS = {
    "conv net": (TinyConvNet, IMAGE_SIZE),
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=4), 32),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=4, img_size=32, patch_size=8), 32),
    "transformers vit": (tiny_vit, IMAGE_SIZE),
}


def student_of(name, count=8, **config):
    torch.manual_seed(0)
    build, size = MODELS[name]
    model = build()
    images = torch.randn(count, 3, size, size)
    quantize_model(model, QuantizationConfig(**config))
    calibrate_model(model, [images], disable_progress=True)
    return model.train(), images


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


class TestDevice:
    @pytest.mark.parametrize("quantizer", list_quantizers())
    @pytest.mark.parametrize("name", MODELS)
    def test_a_step_never_reads_a_number_back(self, name, quantizer):
        student, images = student_of(name, quantizer=quantizer)
        target = torch.randn(len(images), 4)
        # Fake tensors have no data: whatever would wait for a device to read a number raises.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for module in student.modules():
                for table in (module._parameters, module._buffers):
                    for key, tensor in table.items():
                        if tensor is not None:
                            table[key] = _fake(mode, tensor)
            loss = distillation_loss(logits_of(student(_fake(mode, images))), _fake(mode, target))
            loss.backward()
            assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
            with pytest.raises(DataDependentOutputException):
                loss.item()


def _fake(mode, tensor):
    fake = mode.from_tensor(tensor.detach())
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@pytest.mark.process
class TestCompiled:
    @pytest.mark.parametrize(
        ("name", "quantizer"),
        [
            ("conv net", "lsq"),
            pytest.param("conv net", "ewgs", marks=pytest.mark.slow),
            pytest.param("transformers vit", "lsq", marks=pytest.mark.slow),  # a minute
        ],
    )
    def test_the_whole_student_is_one_graph_and_new_batch_sizes_one_more(self, name, quantizer):
        student, images = student_of(name, count=12, quantizer=quantizer)
        expected = logits_of(copy.deepcopy(student)(images[:8])).detach()
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(student, backend=counter, fullgraph=True)
        found = logits_of(compiled(images[:8]))
        found.sum().backward()
        torch.testing.assert_close(found.detach(), expected)
        assert counter.frame_count == 1
        for count in (5, 12, 7, 9):
            logits_of(compiled(images[:count])).sum().backward()
        assert counter.frame_count == 2  # one for any batch

    def test_the_partitioner_keeps_no_mask_of_a_quantizer_for_the_backward(self):
        torch.manual_seed(0)
        floats = sqakd_models.resnet20_cifar(num_classes=4)
        images = torch.randn(4, 3, 32, 32)
        student = copy.deepcopy(floats)
        quantize_model(student, QuantizationConfig(quantizer="ewgs"))
        calibrate_model(student, [images], disable_progress=True)

        def masks_of(model):
            kept = []
            torch._dynamo.reset()
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda kept: kept):
                torch.compile(model.train(), backend="aot_eager_decomp_partition")(images)
            return sum(tensor.numel() for tensor in kept if tensor.dtype == torch.bool)

        # The student's own are no more than the float network's (of a ReLU): 17 of that size without `_late_zero`.
        assert masks_of(student) <= masks_of(floats) > 0


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("quantizer", list_quantizers())
    def test_codes_of_a_narrow_input_are_those_of_its_float32_values(self, quantizer, bits, dtype):
        module = create_quantizer(quantizer, bits=bits, role="activation", signed=True)
        x = torch.randn(4000, generator=torch.Generator().manual_seed(bits))
        module.init_range(x)
        narrow = x.to(dtype)
        with torch.autocast("cpu", dtype):
            values, codes = module(narrow), module.quantize(narrow)
        assert torch.equal(codes, module.quantize(narrow.float()))
        assert torch.equal(values, module(narrow.float()).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_changes_no_code_of_weights_and_of_the_first_layers_input(self, dtype):
        student, images = student_of("timm vit")
        seen = {}

        def note(name):
            return lambda module, args, output: seen.setdefault(name, []).append(module.quantize(args[0].detach()))

        for name, module in student.named_modules():
            if isinstance(module, FakeQuantizer) and (module.role == "weight" or name.startswith("patch_embed")):
                module.register_forward_hook(note(name))
        student(images)
        with torch.autocast("cpu", dtype):
            student(images)
        assert len(seen) > 8
        assert all(torch.equal(*codes) for codes in seen.values())

    @pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
    def test_full_evaluation_in_half_precision_keeps_ranges(self, tmp_path, option):
        trainer = make_trainer(tmp_path, tiny_vit, **{option: True})
        trainer.calibrate()
        ranges = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if "quantizer" in name}
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] >= 0
        state = trainer.model.state_dict()
        assert ranges and all(torch.equal(state[name], tensor) for name, tensor in ranges.items())
