"""Train a student whole and sharded (FSDP2), a few steps each, and leave what it becomes: test_distributed.py runs it.

torchrun --nproc_per_node 2 -m tests.helpers.fsdp_run FOLDER
"""

import copy
import sys

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sqakd_hf import FakeQuantizer, InputError, QuantizationConfig, calibrate_model, distillation_loss, quantize_model
from tests.helpers.models import IMAGE_SIZE, tiny_vit


def build() -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    teacher = tiny_vit().eval()
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(weight_bits=4, activation_bits=4))
    images = torch.randn(40, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    calibrate_model(student, [images], disable_progress=True)
    return student.train(), teacher, images


def shard(student: torch.nn.Module, policy: MixedPrecisionPolicy) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (*student.vit.layers, student):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def train(student, teacher, images, rank: int, world: int, autocast: bool = False) -> dict:
    dtypes = set()
    for module in student.modules():
        if isinstance(module, FakeQuantizer):
            module.register_forward_hook(lambda module, *_: dtypes.update(str(s.dtype) for s in module.qparams()))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = []
    for step in range(5):
        batch = images[8 * step : 8 * step + 8].chunk(world)[rank]
        with torch.no_grad():
            target = teacher(batch).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = student(batch).logits
        loss = distillation_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(value)
        losses.append(value.item() / world)
    state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"losses": losses, "dtypes": sorted(dtypes), "state": state}


def main() -> None:
    folder = sys.argv[1]
    torch.distributed.init_process_group("gloo")
    place = torch.distributed.get_rank(), torch.distributed.get_world_size()
    left = {"whole": train(*build(), 0, 1)}

    student, *data = build()
    shard(student, MixedPrecisionPolicy())
    left["sharded"] = train(student, *data, *place)
    if place[0] == 0:
        with student.hf_quantizer.saving("packed", left["sharded"]["state"]):
            student.save_pretrained(f"{folder}/packed")

    student, *data = build()
    shard(student, MixedPrecisionPolicy())
    left["autocast"] = train(student, *data, *place, autocast=True)

    student, *data = build()
    shard(student, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        train(student, *data, *place)
    except InputError as error:
        left["refused"] = str(error)
    if place[0] == 0:
        torch.save(left, f"{folder}/left.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
