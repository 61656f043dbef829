"""Train a few steps, in one process or under torchrun, and leave what each process holds: test_distributed.py runs it.

torchrun --nproc_per_node 2 -m tests.helpers.distributed_run FOLDER '{"model": "vit", "batch": 4, "accumulation": 1}'
"""

import copy
import json
import os
import random
import signal
import sys
import time

import torch
from transformers import TrainerCallback

from sqakd_hf import InterruptCallback, QuantizationConfig, SQAKDTrainer, SQAKDTrainingArguments, quantize_model
from sqakd_hf.outputs.forward import predict
from tests.helpers.models import IMAGE_SIZE, TinyConvNet, tiny_vit


RANK = int(os.environ.get("RANK", 0))


class Images(torch.utils.data.Dataset):
    """Seeded noise; with `augmented`, other noise in every process, as a generator of a dataset's own gives."""

    def __init__(self, count: int, augmented: bool = False):
        self.pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
        if augmented:
            self.pixels = (self.pixels + RANK).abs() if RANK else self.pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The first batch has no label, which is of one process alone where there are two.
        return {"pixel_values": self.pixels[index], "label": None if index < 4 else index % 4}


def fail_at_third_call(how: str):
    """A hook of the teacher that ends its process, or its work, as it computes."""
    calls = []

    def hook(*_):
        calls.append(how)
        if len(calls) == 3 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(calls) == 3 and how == "fails":
            raise OSError("cannot identify image file a.png")

    return hook


class CtrlC(TrainerCallback):
    """Ctrl-C in the second process at a step; steps of the processes take times of their own."""

    def __init__(self, step: int):
        self.step = step
        self.random = random.Random(RANK)

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.random.uniform(0, 0.05))
        if RANK == 1 and state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)

    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step} of process {RANK}", flush=True)


def main() -> None:
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    teacher = tiny_vit() if options["model"] == "vit" else TinyConvNet()
    with torch.no_grad():  # no class is everywhere the likeliest
        logits = predict(teacher.eval(), {"pixel_values": Images(64).pixels}).logits
        (teacher.classifier if options["model"] == "vit" else teacher.head).bias.sub_(logits.mean(0))
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(weight_bits=4, activation_bits=4))
    args = SQAKDTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options["batch"],
        gradient_accumulation_steps=options["accumulation"],
        per_device_eval_batch_size=4,
        max_steps=options["steps"],
        learning_rate=0.05,
        quantizer_learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        calibration_images=16,
        save_strategy="steps" if "save_steps" in options else "no",
        save_steps=options.get("save_steps", 500),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        cache_teacher_logits=options.get("cache"),
        freeze_batch_norm=False,
    )
    images = Images(160, augmented=options.get("augmented", False))
    images.fingerprint = f"noise of process {RANK}" if options.get("teacher") == "other images" else "noise"
    interrupt = InterruptCallback()
    callbacks = [interrupt, CtrlC(options["interrupt"])] if "interrupt" in options else None
    trainer = SQAKDTrainer(student, teacher, args, train_dataset=images, eval_dataset=Images(17), callbacks=callbacks)
    if "resume" not in options:
        trainer.calibrate()
        trainer.evaluate()  # accelerate prepares the model for that, and must prepare it again for training
    if RANK == 0 and "teacher" in options:
        teacher.register_forward_pre_hook(fail_at_third_call(options["teacher"]))
    left = {"calibrated": {name: value.clone() for name, value in student.state_dict().items()}}
    trainer.train(options.get("resume"))
    left["step"], left["interrupted"] = trainer.state.global_step, interrupt.interrupted
    left["metrics"] = trainer.evaluate()
    left["agreements"] = [entry["agreement"] for entry in trainer.state.log_history if "agreement" in entry]
    left["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    left["state"] = student.state_dict()
    torch.save(left, f"{folder}/rank{RANK}.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
