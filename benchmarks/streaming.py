"""A long run on a stream, by two processes, killed twice: all 60,000 images of Fashion-MNIST, three epochs, W2A2.

    python benchmarks/streaming.py --output outputs/streaming

`timm/test_resnet` learns from a teacher of its own kind (trained by examples/run_sqakd.py on 10,000 labelled images;
no label reaches the student). The images are a `datasets.IterableDataset`: no length, no index, so the run is counted
in steps. Processes talk by gloo on a CPU and by NCCL on GPUs. The run is killed by SIGKILL after a third and after
two thirds of its steps and goes on from its last complete checkpoint; what it prints is the log.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from sqakd_hf import (
    ImageTransform,
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    load_image_data,
    load_model,
    quantize_model,
)
from sqakd_hf.distillation.checkpoint import last_checkpoint
from sqakd_hf.errors import InputError
from sqakd_hf.hub.model_preprocessing import preprocessing


SCRIPT = Path(__file__).parents[1] / "examples" / "run_sqakd.py"
IMAGES, EPOCHS, BATCH, PROCESSES, EVERY = 60_000, 3, 64, 2, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/streaming"))
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # what each process is started with
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.output / "source" / "teacher"
    if options.train:
        train(options.output / "run", teacher)
        return
    if not teacher.exists():
        say("training the teacher")
        arguments = (
            "--model timm/test_resnet --dataset fashion_mnist --image_size 28 --max_train_images 10000 "
            "--max_test_images 2000 --teacher_epochs 6 --teacher_learning_rate 5e-3 --max_steps -1 "
            "--num_train_epochs 0.01 --disable_tqdm true --overwrite_output_dir --validation_fraction 0 "
            "--save_strategy no --recipe paper"
        )
        command = [sys.executable, str(SCRIPT), *arguments.split(), "--output_dir", str(teacher.parent)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps = EPOCHS * IMAGES // (BATCH * PROCESSES)
    for stop_after in (steps // 3, 2 * steps // 3, None):
        watch(options.output, stop_after)


def watch(output: Path, stop_after: int | None) -> None:
    """Start the processes, pass on what they say, and kill them at a step, or wait for their end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command = [sys.executable, *launcher, __file__, "--train", "--output", str(output)]
    say(f"starting {PROCESSES} processes" + (f", to be killed at step {stop_after}" if stop_after else ""))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"\d\d:\d\d:\d\d ", line):
            print(line, end="", flush=True)
        found = re.search(r"step (\d+):", line)
        if found and stop_after and int(found[1]) >= stop_after:
            # The launcher and what it started, which is in sessions of its own: all have this in their commands.
            subprocess.run(["pkill", "-KILL", "-f", f"[-]-train --output {output}"], check=True)
            process.wait()
            say("killed")
            return
    if process.wait() != 0:
        sys.exit("the run failed")


def train(folder: Path, teacher_folder: Path) -> None:
    """Train in one of the processes, from the last complete checkpoint if there is one."""
    teacher = load_model(str(teacher_folder))
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(weight_bits=2, activation_bits=2, residual_bits=None))
    data = load_image_data("fashion_mnist")
    expected = preprocessing(teacher)
    transform = ImageTransform(28, expected.mean, expected.std, interpolation=expected.interpolation)
    # Arrow's shards: what several processes and workers can share out.
    stream = data.train.to_iterable_dataset(num_shards=16).shuffle(seed=0, buffer_size=2000)
    stream = stream.map(transform, batched=True, batch_size=64, remove_columns=["image", "label"])
    test = data.test.with_transform(transform)
    args = SQAKDTrainingArguments(
        output_dir=str(folder),
        max_steps=EPOCHS * IMAGES // (BATCH * PROCESSES),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=256,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
        logging_steps=EVERY,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    trainer = Reporting(student, teacher, args, train_dataset=stream, eval_dataset=test)
    try:
        checkpoint = last_checkpoint(args.output_dir)
    except InputError:
        checkpoint = None
        trainer.calibrate()
        trainer.report("calibrated", trainer.evaluate())
    else:
        trainer.report(f"going on from {Path(checkpoint).name}", {})
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.report("trained", trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        stored = (folder / "model.safetensors").stat().st_size
        say(f"stored {stored:,} bytes, float {(teacher_folder / 'model.safetensors').stat().st_size:,}")


class Reporting(SQAKDTrainer):
    """Prints what it logs, a line each."""

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            self.report(f"step {self.state.global_step}", {key: logs[key] for key in ("loss", "agreement")})

    def report(self, what: str, numbers: dict[str, float]) -> None:
        """Print one line from the first process."""
        if self.is_world_process_zero():
            say(f"{what}: {json.dumps({key: round(value, 4) for key, value in numbers.items()})}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
