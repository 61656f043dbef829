"""Checkpoints: two formats, exact resuming, and what a killed process leaves behind.

The kill test kills six times; `SQAKD_KILLS=50` kills fifty times.
"""

import copy
import json
import os
import random
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset, SequentialSampler
from transformers import AutoModelForImageClassification

from sqakd_hf import (
    InputError,
    QuantizationConfig,
    SQAKDTrainer,
    SQAKDTrainingArguments,
    build_model,
    calibrate_model,
    quantize_model,
    quantized_layers,
)
from sqakd_hf.distillation.checkpoint import is_complete, last_checkpoint
from tests.helpers.models import CLASSES, tiny_vit


pytestmark = pytest.mark.process


def timm_resnet():
    return build_model("timm/test_resnet", CLASSES, image_size=32)


def timm_vit():
    return build_model("timm/test_vit", CLASSES, image_size=32, model_args={"patch_size": 8})


BUILDS = [(tiny_vit, 16), (timm_resnet, 32), (timm_vit, 32)]
MODELS = pytest.mark.parametrize(("build", "size"), BUILDS, ids=["native-vit", "timm-resnet", "timm-vit"])


def make_trainer(folder, build, size, **options):
    torch.manual_seed(0)
    teacher = build()
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizationConfig(quantizer="dorefa", weight_bits=3))
    generator = torch.Generator().manual_seed(1)
    data = [{"pixel_values": torch.randn(3, size, size, generator=generator)} for _ in range(32)]
    args = SQAKDTrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        **{
            "max_steps": 6,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "save_strategy": "steps",
            **options,
        },
    )
    return SQAKDTrainer(student, teacher, args, data, data[:8])


@MODELS
class TestTwoFormats:
    def test_checkpoints_hold_latents_and_the_final_model_is_packed(self, tmp_path, build, size):
        trainer = make_trainer(tmp_path, build, size)
        trainer.train()
        trainer.save_model()
        layers = quantized_layers(trainer.model)
        latent = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        packed = load_file(tmp_path / "model.safetensors")
        assert latent.keys() == packed.keys() == trainer.model.state_dict().keys()
        for name, layer in layers.items():
            assert torch.equal(latent[f"{name}.weight"], layer.weight)
            assert packed[f"{name}.weight"].dtype == torch.uint8 and packed[f"{name}.weight"].dim() == 1
        images = torch.randn(2, 3, size, size)
        trainer.model.eval()
        for folder in (tmp_path, tmp_path / "checkpoint-6"):
            loaded = AutoModelForImageClassification.from_pretrained(folder)
            assert torch.equal(loaded(images).logits, trainer.model(images).logits)
        assert not list(tmp_path.rglob("training_args.bin"))

    def test_resuming_in_a_new_student_gives_the_same_weights(self, tmp_path, build, size):
        whole = make_trainer(tmp_path / "whole", build, size)
        whole.train()
        shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
        resumed = make_trainer(tmp_path / "part", build, size)
        resumed.train(resume_from_checkpoint=True)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name

    def test_a_packed_student_resumes_too(self, tmp_path, build, size):
        whole = make_trainer(tmp_path, build, size)
        whole.train()
        whole.save_model(tmp_path / "packed")
        resumed = make_trainer(tmp_path, build, size)
        resumed.model = resumed.model_wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name

    def test_the_best_model_comes_back_whole(self, tmp_path, build, size):
        trainer = make_trainer(
            tmp_path,
            build,
            size,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="agreement",
            learning_rate=1.0,
        )
        trainer.train()
        best = load_file(os.path.join(trainer.state.best_model_checkpoint, "model.safetensors"))
        last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        state = trainer.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in best.items())
        if not trainer.state.best_model_checkpoint.endswith("checkpoint-6"):
            assert any(not torch.equal(state[name], tensor) for name, tensor in last.items())


def test_the_gathered_state_of_a_spread_model_is_what_gets_packed(tmp_path):
    """FSDP hands the whole state to `_save`, where the model itself holds only a share."""
    trainer, other = (make_trainer(tmp_path / name, tiny_vit, 16) for name in ("one", "two"))
    for each in (trainer, other):
        each.calibrate()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    trainer._save(str(tmp_path / "saved"), state_dict=other.model.state_dict())
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images).logits, other.model.eval()(images).logits)


def augmented(image):
    """Return the image with noise of the three generators that augmentation draws from."""
    return image + 0.3 * (torch.randn(3, 1, 1) + random.random() - np.random.rand()).float()


class Augmented(Dataset):
    """32 images, augmented at random."""

    def __init__(self, size):
        self.images = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": augmented(self.images[index])}


class TestAugmentation:
    """Law 4 for images that are augmented at random."""

    @MODELS
    @pytest.mark.parametrize("step", [2, 4, 6], ids=["in an epoch", "between epochs", "in the next epoch"])
    def test_a_resumed_run_draws_the_same_augmentation(self, tmp_path, build, size, step):
        models = []
        for resume in (None, str(tmp_path / f"checkpoint-{step}")):
            trainer = make_trainer(tmp_path, build, size, max_steps=8)
            trainer.train_dataset = Augmented(size)
            trainer.train(resume)
            models.append(trainer.model.state_dict())
        assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []

    def test_workers_that_live_on_draw_what_one_process_draws(self, tmp_path):
        models = []
        for workers in ({}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}):
            trainer = make_trainer(tmp_path, tiny_vit, 16, max_steps=8, **workers)
            trainer.train_dataset = Augmented(16)
            trainer.train()
            models.append(trainer.model.state_dict())
        assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []

    def test_a_dataset_is_told_the_epoch(self, tmp_path):
        class Told(Augmented):
            def __init__(self):
                super().__init__(16)
                self.epochs = []

            def set_epoch(self, epoch):
                self.epochs.append(epoch)

        trainer = make_trainer(tmp_path, tiny_vit, 16, max_steps=8)
        trainer.train_dataset = Told()
        trainer.train()
        assert sorted(set(trainer.train_dataset.epochs)) == [0, 1]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_epoch_and_every_seed_draws_other_augmentation(self, tmp_path, workers):
        drawn = {}
        for seed in (0, 1):
            trainer = make_trainer(
                tmp_path,
                tiny_vit,
                16,
                seed=seed,
                max_steps=2,
                per_device_train_batch_size=32,  # an epoch is one batch, of all images
                dataloader_num_workers=workers,
                dataloader_persistent_workers=workers > 0,
                save_strategy="no",
            )
            trainer.train_dataset = Augmented(16)
            trainer._get_train_sampler = SequentialSampler  # or another order would be other numbers already
            step, drawn[seed] = trainer.training_step, []

            def keep(model, inputs, *args, step=step, seen=drawn[seed]):
                seen.append(inputs["pixel_values"])
                return step(model, inputs, *args)

            trainer.training_step = keep
            trainer.train()
        batches = drawn[0] + drawn[1]
        assert len(batches) == 4
        for index, batch in enumerate(batches):
            assert not any(torch.allclose(batch, other) for other in batches[:index])


class Shuffled(IterableDataset):
    """A stream of 20 images, in another order in each pass."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        order = torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch))
        return ({"pixel_values": images[i]} for i in order)


def hub_stream():
    generator = torch.Generator().manual_seed(1)
    data = datasets.Dataset.from_dict({"pixel_values": torch.randn(20, 3, 16, 16, generator=generator).tolist()})
    return data.with_format("torch").to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=8)


def augmented_stream():
    return hub_stream().map(lambda item: {"pixel_values": augmented(item["pixel_values"])})


class ShuffledByTheProcess(Shuffled):
    """In an order, and with noise, of the process's own generators."""

    def __iter__(self):
        images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        order = torch.randperm(20).tolist()
        return ({"pixel_values": augmented(images[i])} for i in order)


def draw(*_):
    torch.rand(1)


class TestStreams:
    @pytest.mark.parametrize("stream", [Shuffled, hub_stream, augmented_stream, ShuffledByTheProcess])
    @pytest.mark.parametrize("step", [2, 6, 8], ids=["first pass", "third pass", "fourth pass"])
    def test_a_resumed_run_finds_its_place_in_any_pass(self, tmp_path, stream, step):
        models = []
        for resume in (None, str(tmp_path / f"checkpoint-{step}")):
            trainer = make_trainer(tmp_path, tiny_vit, 16, max_steps=10)
            trainer.model.register_forward_pre_hook(draw)  # as dropout draws
            trainer.train_dataset = stream()
            trainer.train(resume)
            models.append(trainer.model.state_dict())
        assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []

    def test_an_empty_stream_is_a_sentence(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, 16)
        trainer.calibrate()
        trainer.train_dataset = hub_stream().filter(lambda _: False)
        with pytest.raises(InputError, match="holds none"):
            trainer.train()


class TestHalfWritten:
    def test_only_a_folder_with_a_whole_state_file_is_complete(self, tmp_path):
        state = tmp_path / "trainer_state.json"
        assert not is_complete(tmp_path)
        for text, complete in (("", False), ('{"global_step": 2, "lo', False), ('{"global_step": 2}', True)):
            state.write_text(text)
            assert is_complete(tmp_path) is complete

    def test_the_last_complete_checkpoint_is_found_by_number(self, tmp_path, caplog):
        for step, text in ((9, "{}"), (10, '{"global_step": 10}'), (2, '{"global_step": 2}'), (100, "")):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "trainer_state.json").write_text(text)
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
        assert "checkpoint-100" in caplog.text and "checkpoint-9" not in caplog.text

    def test_none_at_all_is_a_sentence(self, tmp_path):
        with pytest.raises(InputError, match="no complete checkpoint in .* none at all"):
            last_checkpoint(tmp_path / "nowhere")
        (tmp_path / "checkpoint-3").mkdir()
        with pytest.raises(InputError, match="only half-written ones: .*checkpoint-3"):
            last_checkpoint(tmp_path)

    def test_resuming_from_a_half_written_one_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, tiny_vit, 16)
        (tmp_path / "checkpoint-4").mkdir()
        with pytest.raises(InputError, match="checkpoint-4.* half-written"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def test_the_config_of_one_save_with_the_weights_of_another_is_refused(self, tmp_path):
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = tiny_vit()
            quantize_model(model)
            calibrate_model(model, [torch.randn(8, 3, 16, 16)], disable_progress=True)
            model.save_pretrained(tmp_path / str(seed))
        shutil.copy(tmp_path / "1" / "config.json", tmp_path / "0" / "config.json")
        with pytest.raises(InputError, match="is not what was saved: .* half-written or of another student"):
            AutoModelForImageClassification.from_pretrained(tmp_path / "0")


KILL = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.distillation.test_checkpoint import BUILDS, AutoModelForImageClassification, last_checkpoint
from tests.distillation.test_checkpoint import load_file, make_trainer
from sqakd_hf.distillation.checkpoint import is_complete

def forked(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid

def trainer_in(folder, kill, max_steps):
    # A constant rate: the steps are the same wherever the run is to end.
    return make_trainer(folder, *BUILDS[kill % len(BUILDS)], max_steps=max_steps, lr_scheduler_type="constant")

root, kills = Path(sys.argv[1]), int(sys.argv[2])
half_written = 0
for kill in range(min(kills, len(BUILDS))):
    done = forked(lambda: trainer_in(root / f"uninterrupted-{kill}", kill, 12).train())
    assert os.waitpid(done, 0)[1] == 0
for kill in range(kills):
    generator = random.Random(kill)
    folder = root / str(kill)
    victim = folder / f"checkpoint-{2 * generator.randint(2, 4)}"
    pid = forked(lambda: trainer_in(folder, kill, 1000).train())
    deadline = time.monotonic() + 60
    while not victim.exists():
        assert time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0), "training died by itself"
    time.sleep(generator.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    half_written += not is_complete(victim)
    last = last_checkpoint(folder)
    end = min(int(last.rpartition("-")[2]) + 4, 12)

    def go_on():
        AutoModelForImageClassification.from_pretrained(last)
        trainer = trainer_in(folder, kill, end)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == end
        assert last_checkpoint(folder).endswith(f"checkpoint-{end}")
        found, expected = (
            load_file(each / f"checkpoint-{end}" / "model.safetensors")
            for each in (folder, root / f"uninterrupted-{kill % len(BUILDS)}")
        )
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []

    assert os.waitpid(forked(go_on), 0)[1] == 0, f"kill {kill}: did not go on from {last} as if nothing had happened"
print("half-written:", half_written)
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    kills = int(os.environ.get("SQAKD_KILLS", "6"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), str(kills)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    half_written = int(done.stdout.rpartition("half-written:")[2])
    assert half_written >= kills // 5, "the kills came too late to test anything"
    print(json.dumps({"kills": kills, "half_written": half_written}))
