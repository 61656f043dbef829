"""`SQAKDTrainer`: transformers' Trainer whose loss is the student's divergence from its teacher."""

import contextlib
import copy
import functools
import json
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import count, islice
from typing import Any, NoReturn

import safetensors.torch
import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import BestRun, EvalLoopOutput, HubStrategy, SaveStrategy, has_length
from transformers.utils import PushInProgress

from .accumulation import SharedWeights
from .card import model_card
from .checkpoint import STATE_FILE, is_complete, last_checkpoint
from .collator import ImageCollator
from .convert import (
    batch_norms,
    calibrate_model,
    is_calibrated,
    quantized_layers,
    quantizers,
    record_signedness,
    reestimate_batch_norm,
    require_float32_latents,
    require_planned_layers,
)
from .delta import estimate_delta
from .errors import InputError, reason
from .functional import widest_float
from .html_report import html_report
from .hub import hub_id
from .interrupt import InterruptCallback
from .last_batch import check_last_batch
from .layer_error import layer_sqnr
from .losses import box_loss, check_same_classes, distillation_loss, masked_mean
from .measurements import Measurements
from .modeling import load_teacher, num_classes, processor_of, record_processor
from .non_finite import (
    NonFiniteError,
    first_non_finite_gradient,
    first_non_finite_layer,
    first_non_finite_parameter,
)
from .objective import Features, feature_terms, parse_objective, total_loss
from .oscillation import OscillationFreezer, dampening_loss, ramp
from .outputs import Prediction, predict, require_classes
from .progressive import ProgressiveBits
from .push import upload_errors, weight_bytes
from .quantizers import FakeQuantizer
from .recompute import recompute_quantized
from .record import TrainingRecord
from .repeatable import RepeatableImages, own_random_numbers
from .report import plot_learning_curve
from .stream import EndlessStream
from .teacher import TEACHER_DTYPES, Teacher
from .teacher_cache import LOGITS, cache_teacher_logits
from .training_args import SQAKDTrainingArguments


logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
DELTAS_FILE = "deltas.json"  # of a checkpoint whose quantizers had theirs estimated
NOT_UPLOADED = ["_*", "checkpoint-*"]
FREEZER_FILE = "oscillations.safetensors"  # of a checkpoint of a training that freezes weights
# What a reader of the card wants to know; all arguments are in ARGUMENTS_FILE.
CARD_ARGUMENTS = (
    "objective",
    "temperature",
    "learning_rate",
    "quantizer_learning_rate",
    "calibration_images",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
    "bf16",
    "fp16",
    "reestimate_batch_norm",
    "freeze_batch_norm",
    "oscillation_dampening",
    "oscillation_freezing",
    "progressive_bits",
    "delta_estimation_steps",
)


class SQAKDTrainer(Trainer):
    """Distil a quantized student from its full-precision teacher, on images without labels.

    The loss is [`distillation_loss`] of the two models' logits on the same batch and nothing else (unless
    `args.objective` asks for labels or features, to compare with that), whether they are
    one set an image, one a pixel (segmentation; pixels where the batch's `valid_mask` is `False` are left out) or one
    a query. A detector's boxes, which are no distribution, add their [`~sqakd_hf.losses.box_loss`]. Labels in the
    batch never reach that loss; `evaluate` uses them, where they exist, to add the accuracy.

    Args:
        model (`nn.Module`): The student, after [`quantize_model`]; a transformers model, or a timm (or any other)
            module that takes images `(B, C, H, W)` and returns logits `(B, K)`. If it has no ranges yet, `train`
            calibrates it first. `None` with `model_init`, which makes one for each training.
        teacher_model (`nn.Module`, `str` or a list of them): The full-precision model, or a name for
            [`load_teacher`]; of any architecture with the same classes. The student learns the mean of the
            distributions of several; a detector has one, which it was copied from. Teachers stay outside the student:
            in eval mode, without gradients, neither saved nor optimised.
        args (`SQAKDTrainingArguments`, *optional*): Training arguments.
        train_dataset, eval_dataset: Datasets that yield `pixel_values` `(C, H, W)` and, optionally, `labels`.
        **kwargs: All else that [`~transformers.Trainer`] takes.

    Raises:
        `InputError`: No teacher, a student that is not quantized or was changed after that, a teacher that is
            quantized or the student itself, a different number of classes, a model without class logits.

    `evaluate()` returns `eval_loss` (the divergence), `eval_agreement` (share of images where student and teacher
    name the same class) and, where the dataset has labels, `eval_accuracy`; exact means over the images, whatever
    the batch size and the number of processes. `metric_for_best_model` takes any of them.
    """

    # compute_loss returns the mean of its batch: Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        teacher_model: nn.Module | str | Sequence[nn.Module | str] | None = None,
        args: SQAKDTrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        **kwargs: Any,
    ):
        if teacher_model is None:
            raise InputError("A student learns from its teacher: pass teacher_model, a full-precision model.")
        given = list(teacher_model) if isinstance(teacher_model, list | tuple) else [teacher_model]
        if not given:
            raise InputError("teacher_model is an empty list. Pass at least one full-precision model.")
        self._teachers = [load_teacher(teacher) if isinstance(teacher, str) else teacher for teacher in given]
        args = SQAKDTrainingArguments() if args is None else args
        if not isinstance(args, SQAKDTrainingArguments):
            raise InputError(f"args must be SQAKDTrainingArguments, got {type(args).__name__}.")
        args.check_devices()
        self.args = args
        if model is not None:
            self._take_student(model)
        elif kwargs.get("model_init") is None:
            raise InputError("There is no student: pass model, or model_init, a function that returns one.")
        kwargs.setdefault("data_collator", ImageCollator())
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        record_processor(self.model, self.processing_class)
        # transformers before `loss_is_scaled_for_ga` decides by this attribute alone.
        self.model_accepts_loss_kwargs = False
        self.teacher = Teacher(
            self._teachers,
            args.device,
            self._teacher_dtype(),
            args.channels_last,
            compile_options=self._compile_options(),
        )
        self._objective = parse_objective(args.objective)
        self.add_callback(_AtBegin(self._add_first_candidate, self._begin_epoch))
        self.add_callback(_AfterOptimizerStep(self._freeze_oscillating))
        self._evaluated: dict[str, _RunningMean] = {}
        self._format = "packed"
        self._hub = HfApi()  # one: it uploads in the background one after the other

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if fsdp is not None and fsdp.fsdp_version == 2:
            # Its own would cast ranges too; autocast, which accelerate applies as well, casts what is multiplied.
            fsdp.mixed_precision_policy = MixedPrecisionPolicy()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new student of `model_init`, checked like one that the trainer is given."""
        model = super().call_model_init(trial)
        if model is self.model:
            raise InputError(
                "model_init returned the student that this trainer has already. Return a new one: "
                "copy.deepcopy(teacher), then quantize_model."
            )
        self._take_student(model)
        record_processor(model, getattr(self, "processing_class", None))
        return model

    def _take_student(self, model: nn.Module) -> None:
        """Refuse a model that can't be this trainer's student; keep nothing of the student before."""
        require_planned_layers(model)
        require_classes(model)
        if not quantized_layers(model):
            raise InputError(
                "The student is not quantized. Call quantize_model(model, QuantizationConfig(...)) first."
            )
        if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
            raise InputError(
                "The student has quantized layers that quantize_model did not put there, and could not be saved. "
                "Use quantize_model, with overrides for single layers."
            )
        for teacher in self._teachers:
            if teacher is model:
                raise InputError("Student and teacher are one object. Use copy.deepcopy(model) before quantizing it.")
            if quantized_layers(teacher):
                raise InputError("The teacher is quantized. Pass the full-precision model.")
            require_classes(teacher)
            classes = num_classes(model), num_classes(teacher)
            if None not in classes:
                check_same_classes(*classes)
        for each in (model, *self._teachers):
            _forget_preparation(each)
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)
        self._measurements = Measurements()
        self._frozen_norms: list[nn.Module] = []
        self.layer_sqnr: dict[str, dict[str, float]] = {}
        self._calibrated = False
        self._agreement = _RunningMean()
        self._feature_terms: Features | None = None
        self._freezer: OscillationFreezer | None = None
        self._progressive: ProgressiveBits | None = None
        self._stage: int | None = None
        self._deltas_of_step = 0

    def _ranges(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that learn by `quantizer_learning_rate`."""
        own = (parameter for quantizer in quantizers(model) for parameter in quantizer.parameters(recurse=False))
        return [parameter for parameter in own if parameter.requires_grad]

    def _teacher_dtype(self) -> torch.dtype:
        name = self.args.teacher_dtype
        if name == "auto":
            name = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision, "float32")
        return TEACHER_DTYPES[name]

    def _compile_options(self) -> dict[str, Any] | None:
        """Return how accelerate compiles the student, or `None` if it does not."""
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend == DynamoBackend.NO:
            return None
        return {key: value for key, value in plugin.to_kwargs().items() if key != "use_regional_compilation"}

    # --- training ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train; a student without ranges is calibrated first, unless a checkpoint brings them.

        `resume_from_checkpoint=True` goes on from the last complete checkpoint: a run that was killed while it saved
        leaves a half-written one, which is passed over.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise InputError(
                f"The checkpoint {resume_from_checkpoint!r} does not exist or is half-written. "
                "resume_from_checkpoint=True finds the last complete one."
            )
        self._checkpoint = resume_from_checkpoint or None
        try:
            with contextlib.ExitStack() as self._training:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._progressive is not None and self._progressive.leave():
                self.calibrate()  # stopped before its last stage
        finally:
            self.is_in_train = False
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, InterruptCallback):
                    callback.close()  # an error comes without on_train_end
            if self._progressive is not None:
                self._progressive.leave()
                self._progressive = None
            if self._feature_terms is not None:
                self._feature_terms.remove()
                self._feature_terms = None
        if self._chooses_best and self.state.best_global_step is not None:
            self._measurements.keep_step(self.state.best_global_step)
            if self.kept_calibrated:
                logger.warning(
                    "Training did not help: by %s on the held-out images no step of it was better than the calibrated "
                    "student, which is kept.",
                    self._best_metric_name,
                )
        if self.args.reestimate_batch_norm:
            self._reestimate_batch_norm()
        return output

    # --- the choice of the best student ---

    @property
    def _chooses_best(self) -> bool:
        return self.args.load_best_model_at_end and self.eval_dataset is not None

    @property
    def _best_metric_name(self) -> str:
        return f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"

    @property
    def kept_calibrated(self) -> bool:
        """Whether training ended with the student as it was before its first step, which no later one surpassed."""
        return self._chooses_best and self.state.best_global_step == 0

    def _add_first_candidate(self) -> None:
        """Evaluate and save the student before its first step, which takes part in the choice of the best."""
        if not self._chooses_best or self.state.global_step > 0 or self.state.best_model_checkpoint is not None:
            return
        metrics = self._evaluate(self._trial, None, skip_scheduler=True)
        self._determine_best_metric(metrics, self._trial)
        # Trainer knows the folder of a best step from 1 on.
        self.state.best_model_checkpoint = self._checkpoint_folder(self._trial)
        self._save_checkpoint(self.model, self._trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _checkpoint_folder(self, trial: Any) -> str:
        return os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")

    def _reestimate_batch_norm(self) -> None:
        """Replace BatchNorm's statistics by those of training images, unless held-out images say that it does harm."""
        norms = batch_norms(self.model)
        before = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in norms]
        reestimate_batch_norm(
            self.model,
            self._sample(self.args.reestimate_batch_norm),
            disable_progress=not self.is_world_process_zero(),
        )
        if not self._chooses_best:
            return
        name, best = self._best_metric_name, self.state.best_metric
        value = super().evaluate()[name]
        if value >= best if self.args.greater_is_better else value <= best:
            self.state.best_metric = value
            return
        logger.warning(
            "New BatchNorm statistics made the student worse on the held-out images (%s %.4g instead of %.4g): it "
            "keeps those of its training. reestimate_batch_norm=0 does not try.",
            name,
            value,
            best,
        )
        for module, buffers in zip(norms, before, strict=True):
            for key, buffer in module.named_buffers():
                buffer.copy_(buffers[key])
        self._measurements.keep_step(self.state.best_global_step)

    # --- trials ---

    def _hp_search_setup(self, trial: Any) -> None:
        """Set what a trial changes of the arguments, and get ready: the student is made, no checkpoint is loaded.

        `Trainer.train` calls it there, with and without a trial.
        """
        rate = self.args.quantizer_learning_rate
        follows = rate == self.args.learning_rate / 100
        super()._hp_search_setup(trial)
        if follows and self.args.quantizer_learning_rate == rate:
            self.args.quantizer_learning_rate = self.args.learning_rate / 100
        self._objective = parse_objective(self.args.objective)
        self._get_ready()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search as [`~transformers.Trainer.hyperparameter_search`] does; what is minimised is by default `eval_loss`.

        Trainer's own default is the sum of the other metrics, the agreement with the teacher among them.
        """
        if compute_objective is None and direction == "minimize":
            compute_objective = operator.itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, **kwargs)

    def _get_ready(self) -> None:
        """Let student, images and what goes with them begin a training."""
        require_planned_layers(self.model)
        require_float32_latents(self.model)
        if self._checkpoint is None and not is_calibrated(self.model):
            self.calibrate()
        self.model.train()  # a student loaded from codes becomes latent before it is spread over devices
        self._check_options()
        if self._checkpoint is None:
            self._measurements.begin_training()
        if not self._chooses_best:
            logger.warning(
                "No held-out images compare the trained student with the calibrated one: the trained one is kept, "
                "whatever it lost. Pass eval_dataset, load_best_model_at_end=True, eval_strategy and save_strategy."
            )
        self._agreement = _RunningMean()
        self._freezer = self._progressive = self._stage = None
        deltas = _read_deltas(self._checkpoint, self.args.delta_estimation_steps)
        if self.args.delta_estimation_steps:
            self._deltas_of_step = 0
            self._set_deltas(deltas)
        if self.args.oscillation_freezing:
            self._freezer = OscillationFreezer(quantized_layers(self.model), self.args.oscillation_freezing)
            if self._checkpoint is not None:
                _load_freezer(self._freezer, self._checkpoint)
        if self.args.progressive_bits:
            self._progressive = ProgressiveBits(self.model, self.args.progressive_bits)
        self._shared_weights = SharedWeights(self.model)
        if self.model_wrapped is self.model:
            _forget_preparation(self.model)
        self._training.enter_context(self._images_as_trained())

    def _check_options(self) -> None:
        """Refuse, before the first step, options that this model or this way of running it has no use for."""
        looks_inside = feature_terms(self._objective)
        if self._shards_weights():
            for option, asked in (
                (f"The objective {self.args.objective!r}", looks_inside),
                ("oscillation_dampening", self.args.oscillation_dampening),
                ("oscillation_freezing", self.args.oscillation_freezing),
                ("progressive_bits", self.args.progressive_bits),
                ("delta_estimation_steps", self.args.delta_estimation_steps),
            ):
                if asked:
                    raise InputError(f"{option} needs whole weights: it does not work where they are sharded.")
        if looks_inside and len(self.teacher.models) > 1:
            raise InputError(
                f"The objective {self.args.objective!r} compares features: pass one teacher, not several."
            )
        norms = batch_norms(self.model)
        for option in ("reestimate_batch_norm", "freeze_batch_norm"):
            if getattr(self.args, option) not in (0, "auto") and not norms:
                raise InputError(f"{option}: the student has no BatchNorm.")
        self._frozen_norms = norms if self.args.freezes_batch_norm else []
        if not self._frozen_norms:
            check_last_batch(self.model, self.args, self.train_dataset, self.data_collator)

    @contextlib.contextmanager
    def _images_as_trained(self) -> Iterator[None]:
        """Let images bring their teacher's logits if `cache_teacher_logits` says so, and let streams never end.

        What is augmented at random draws numbers that a resumed run draws as well.
        """
        images = self.train_dataset
        if self.args.cache_teacher_logits is not None:
            self.train_dataset = cache_teacher_logits(
                images,
                self.args.cache_teacher_logits,
                self._logits_to_cache,
                f"{self.teacher.fingerprint()} T={self.args.temperature} {self.args.output_field}",
                self.data_collator,
                self.args.per_device_eval_batch_size,
                self.args.dataloader_num_workers,
                computes=self.is_local_process_zero(),
                disable_progress=self.args.disable_tqdm or not self.is_world_process_zero(),
            )
        elif isinstance(images, IterableDataset) and not has_length(images):
            self.train_dataset = EndlessStream(images, self.args.seed)
        elif images is not None and not isinstance(images, IterableDataset):
            self.train_dataset = RepeatableImages(images, self.args.seed)
        try:
            yield
        finally:
            self.train_dataset = images

    def _freeze_oscillating(self, progress: float) -> None:
        if self._freezer is not None:
            self._freezer.step(progress)

    def _begin_epoch(self, epoch: int) -> None:
        if isinstance(self.train_dataset, RepeatableImages):
            self.train_dataset.begin_epoch(epoch)

    def _logits_to_cache(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        prediction = self.teacher_prediction(self._prepare_inputs(batch))
        if prediction.boxes is not None:
            raise InputError("cache_teacher_logits keeps class logits alone: a detector's teacher has boxes as well.")
        return prediction.logits

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last and inputs["pixel_values"].dim() == 4:
            inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return inputs

    def calibrate(self) -> None:
        """Set the student's ranges by [`calibrate_model`], from `args.calibration_images` of the training images.

        Every process reads the same images and takes the ranges of the first.
        """
        if self.train_dataset is None:
            raise InputError("Calibration needs images: pass train_dataset, or call calibrate_model yourself.")
        self._move_model_to_device(self.model, self.args.device)
        calibrate_model(
            self.model,
            list(self._sample(self.args.calibration_images)),
            disable_progress=not self.is_world_process_zero(),
        )
        self._follow_first_process()
        self._calibrated = True

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What was measured on the images evaluated last: teacher, student, and the student before its first step."""
        return self._measurements.last.rows if self._measurements.last else {}

    @property
    def _step_of_student(self) -> int | None:
        """The step of the training that the student is of, 0 before the first; `None` where nothing was trained."""
        if not self.is_in_train and self._chooses_best and self.state.best_global_step is not None:
            return self.state.best_global_step
        return self.state.global_step if self.is_in_train or self.state.global_step or self._calibrated else None

    @property
    def _measured_as(self) -> str:
        """What the student is: `"calibrated"`, before its first step, or a trained `"student"`."""
        before = self._calibrated or self.is_in_train
        return "calibrated" if before and self.state.global_step == 0 else "student"

    def measure_layers(self, images: int = 64) -> dict[str, float]:
        """Return how far each layer's output is from the teacher's, in dB, and keep it for the report.

        See [`~sqakd_hf.layer_error.layer_sqnr`]. It is empty where the teacher is of another architecture, where there
        are several, and for a student that is sharded over processes. Images are the same each time, also as they are
        augmented, and training's random numbers stay what they are.

        Args:
            images (`int`, *optional*, defaults to 64): So many of the training images, at least 2.
        """
        if not is_calibrated(self.model):
            raise InputError("The student has no ranges yet. Call trainer.calibrate() or trainer.train() first.")
        if self.train_dataset is None:
            raise InputError("Layers are measured on training images: pass train_dataset.")
        if images < 2:
            raise InputError(f"images must be at least 2, got {images!r}.")
        if len(self.teacher.models) > 1 or _is_sharded(self.model):
            return {}
        self._move_model_to_device(self.model, self.args.device)
        teacher = self.teacher.models[0]
        if any(parameter.dtype != torch.float32 for parameter in teacher.parameters()):
            teacher = copy.deepcopy(teacher).float()
        batches = map(self._prepare_inputs, self._sample(images))
        self.layer_sqnr[self._measured_as] = layer_sqnr(self.model, teacher, batches)
        return self.layer_sqnr[self._measured_as]

    @torch.no_grad()
    def _follow_first_process(self) -> None:
        """Give every process the first one's ranges and buffers: DDP evens them only as a training forward begins."""
        if self.args.world_size == 1:
            return
        own = [tensor for quantizer in quantizers(self.model) for tensor in quantizer.range_tensors().values()]
        for tensor in {id(tensor): tensor for tensor in (*own, *self.model.buffers())}.values():
            if not isinstance(tensor, DTensor):  # sharded: the processes hold parts of one tensor
                torch.distributed.broadcast(tensor.data, src=0)
        for quantizer in quantizers(self.model):
            quantizer.refresh()
        record_signedness(self.model)

    def _sample(self, total: int, batch: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yield `total` training images, without labels, in batches of at least 32 or of the size that is given.

        They are drawn and augmented at random, in every process and each time in the same way: the first of a folder
        are all of one class. A stream has no others than its first.
        """
        dataset, batch = self.train_dataset, batch or max(self.args.train_batch_size, 32)
        if isinstance(dataset, IterableDataset):
            with own_random_numbers(self.args.seed):
                images = islice(dataset, total)
        else:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.args.seed))
            images = map(dataset.__getitem__, order[:total].tolist())
        for number in count():
            with own_random_numbers(self.args.seed, number):
                features = list(islice(images, batch))
                if len(features) < 2:  # of one image there are no batch statistics
                    return
                collated = self.data_collator(features)
            yield {name: tensor for name, tensor in collated.items() if name != "labels"}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return `args.objective`, the mean over the batch; with `return_outputs` also the logits.

        By default that is `T² · KL(teacher ‖ student)`.
        """
        saving = self.args.activation_memory == "low"
        if model.training and self.args.cache_teacher_logits is not None and LOGITS not in inputs:
            raise InputError(f"The data_collator dropped {LOGITS!r}, which cache_teacher_logits adds to each image.")
        if model.training:
            for module in self._frozen_norms:
                module.eval()
        with contextlib.ExitStack() as stack:
            features = self._features(inputs)
            for context in () if features is None else features.listening():
                stack.enter_context(context)
            with recompute_quantized() if saving else contextlib.nullcontext():
                student = self._predict(model, inputs)
            teacher = self.teacher_prediction(inputs)
            mask = student.mask_of(inputs)
            loss = total_loss(
                self._objective,
                lambda: self._loss(student, teacher, mask),
                student,
                inputs.get("labels"),
                features,
                self.args.label_smoothing_factor,
            )
        if self.args.oscillation_dampening and model.training:
            weight = self.args.oscillation_dampening * ramp(self.state.global_step, self.state.max_steps)
            loss = loss + weight * dampening_loss(quantized_layers(self.model).values())
        if model.training:
            agreement, counts = _agreement(student, teacher, mask), student.counted(mask)
            self._agreement.add((agreement * counts).sum(), counts.sum())
            self._check_loss(loss, inputs)
        return (loss, {"logits": student.logits, "teacher_logits": teacher.logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute loss and gradients of a batch; on a CPU, stop where a gradient is not finite."""
        if self._progressive is not None:
            self._enter_stage()
        every, step = self.args.delta_estimation_steps, self.state.global_step
        if every and step and step % every == 0 and step != self._deltas_of_step:
            self._estimate_deltas()
        with self._weights_quantized_once():
            loss = super().training_step(model, *args, **kwargs)
        if self._looks_at_numbers and not _is_sharded(self.model):
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not torch.isfinite(norm) and (where := first_non_finite_gradient(self.model)) is not None:
                self._stop_at_non_finite("The gradient's norm", norm.item(), where)
        return loss

    def _features(self, inputs: dict[str, Any]) -> Features | None:
        """Return the feature terms of the objective, if it has any; the first batch shows where features are."""
        names = feature_terms(self._objective)
        if not names:
            return None
        if self._feature_terms is None:
            teacher = self.teacher.models[0]
            self._feature_terms = Features(names, self.model, teacher, inputs, self.args.feature_layer)
        return self._feature_terms

    def _weights_quantized_once(self) -> contextlib.AbstractContextManager:
        """Share the quantized weights between the batches whose gradients are accumulated."""
        # A compiled model decides itself what is computed when; sharded weights are whole only while they are used;
        # and DDP may want a gradient of every parameter in every batch, or know which have none.
        ddp = self.args.world_size > 1 and (
            self.args.ddp_find_unused_parameters
            or (self.args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch")
        )
        compiled = self._compile_options() is not None
        if self.args.gradient_accumulation_steps == 1 or compiled or ddp or self._shards_weights():
            return contextlib.nullcontext()
        return self._shared_weights.batch(is_last=self.accelerator.sync_gradients)

    def _shards_weights(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or _is_sharded(self.model)

    def _enter_stage(self) -> None:
        """Give the quantizers the bits of this step's stage; where it begins, set their ranges anew."""
        step, steps = self.state.global_step, self.state.max_steps
        stage = self._progressive.stage(step, steps)
        if stage == self._stage:
            return
        self._progressive.enter(stage)
        self._stage = stage
        if step == 0 or stage != self._progressive.stage(step - 1, steps):  # else a checkpoint brought the ranges
            self._progressive.forget_ranges()
            self.calibrate()
            for parameter in self._ranges(self.model):
                self.optimizer.state.pop(parameter, None)  # what it remembers is of other ranges

    def _estimate_deltas(self) -> None:
        """Set every quantizer's `delta` from the curvature of the loss at three batches of training images."""

        def loss(inputs: dict[str, Any]) -> torch.Tensor:
            student = predict(self.model, inputs, self.args.output_field)
            return self._loss(student, self.teacher_prediction(inputs), student.mask_of(inputs))

        batch = max(self.args.train_batch_size, 2)
        batches = [self._prepare_inputs(inputs) for inputs in self._sample(3 * batch, batch)]
        with _own_forward(self.model):  # in float32: half precision is too coarse for second differences
            found = estimate_delta(
                self.model,
                loss,
                batches,
                running_statistics=bool(self._frozen_norms),
                disable_progress=self.args.disable_tqdm,
            )
        values = torch.tensor(
            [found.get(quantizer, 0.0) for quantizer in quantizers(self.model)], device=self.args.device
        )
        if self.args.world_size > 1:  # sums may differ between devices
            torch.distributed.broadcast(values, src=0)
        self._set_deltas(dict(zip(_quantizer_names(self.model), values.tolist(), strict=True)))
        self._deltas_of_step = self.state.global_step

    def _set_deltas(self, deltas: dict[str, float]) -> None:
        for name in _quantizer_names(self.model):
            self.model.get_submodule(name).delta = deltas.get(name, 0.0)

    def _predict(self, model: nn.Module, inputs: dict[str, Any]) -> Prediction:
        # accelerate wraps the forward of other models in autocast, but not of those that FSDP2 shards.
        with self.accelerator.autocast():
            return predict(model, inputs, self.args.output_field)

    def _loss(
        self, student: Prediction, teacher: Prediction, mask: torch.Tensor | None, reduction: str = "mean"
    ) -> torch.Tensor:
        loss = distillation_loss(student.logits, teacher.logits, self.args.temperature, reduction, mask)
        if student.boxes is not None and teacher.boxes is not None:
            loss = loss + box_loss(student.boxes, teacher.boxes, teacher.logits, reduction)
        return loss

    def teacher_prediction(self, inputs: dict[str, Any]) -> Prediction:
        """Return what the teachers say of a prepared batch: the mean of their distributions, and of their boxes."""
        if LOGITS in inputs:
            prediction = Prediction(inputs[LOGITS])
        else:
            prediction = self.teacher.predict(inputs, self.args.temperature, self.args.output_field)
        if prediction.by_query:
            self.teacher.require_corresponding_queries(self.model)
        return prediction

    @property
    def _looks_at_numbers(self) -> bool:
        """Whether each step looks at its loss and gradients: on an accelerator that is to wait; there, `log` looks."""
        return self.args.device.type == "cpu"

    def _check_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        if not self._looks_at_numbers or torch.isfinite(loss):
            return
        where = "not looked for in a model that is sharded"
        if not _is_sharded(self.model):
            if self.args.world_size > 1:
                self.model.eval()  # SyncBatchNorm would wait for the other processes
            where = first_non_finite_layer(self.model, lambda: self._predict(self.model, inputs))
        self._stop_at_non_finite("The loss", loss.item(), where)

    def _stop_at_non_finite(self, what: str, value: float, where: str) -> NoReturn:
        raise NonFiniteError(
            f"{what} is {value} at step {self.state.global_step}. First not finite: {where}. Lower learning_rate or "
            "quantizer_learning_rate, clip gradients (max_grad_norm), or train in float32 or bf16; checkpoints of "
            "earlier steps are as they were."
        )

    def _require_finite_model(self) -> None:
        """Let no parameter that is NaN be saved or evaluated: it would take the place of the last good checkpoint."""
        if (bad := first_non_finite_parameter(self.model)) is not None:
            raise NonFiniteError(
                f"The student's {bad} is not finite at step {self.state.global_step}: training met NaN or infinity "
                "since the last log. logging_steps=1 shows the step; the last checkpoint is from before."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Group the parameters: decayed weights, other weights, and ranges with their own rate and no decay."""
        ranges = self._ranges(self.model if model is None else model)
        if self.optimizer is not None:
            if isinstance(self.optimizer, torch.optim.Optimizer):  # DeepSpeed's stand-in has no groups yet
                self._warn_of_missing(ranges)
            return self.optimizer
        for parameter in ranges:
            parameter.requires_grad_(False)
        try:
            super().create_optimizer(*(() if model is None else (model,)))
        finally:
            for parameter in ranges:
                parameter.requires_grad_(True)
        if ranges:
            # Last: Trainer logs the learning rate of the first group.
            self.optimizer.add_param_group(
                {"params": ranges, "lr": self.args.quantizer_learning_rate, "weight_decay": 0.0}
            )
        return self.optimizer

    def _warn_of_missing(self, ranges: list[nn.Parameter]) -> None:
        """Say it if an optimizer that was passed leaves out what the student learns by."""
        given = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        weights = [layer.stored_weight for layer in quantized_layers(self.model).values()]
        weights = [weight for weight in weights if weight.requires_grad]
        for what, own in (("ranges of its quantizers", ranges), ("quantized weights", weights)):
            if missing := sum(id(parameter) not in given for parameter in own):
                logger.warning(
                    "The optimizer that was passed lacks %d of the student's %d %s: those stay as they are. Make it "
                    "of the parameters of the quantized student, or let the trainer make one.",
                    missing,
                    len(own),
                    what,
                )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay matrices and kernels; not biases, nor the vectors of any normalisation."""
        names = set(super().get_decay_parameter_names(model))
        return [name for name, parameter in model.named_parameters() if name in names and parameter.dim() > 1]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to training logs the agreement with the teacher since the last one, and the share of frozen weights.

        To be called by all processes.
        """
        for name, what in (("loss", "The loss"), ("grad_norm", "The gradient's norm")):
            # In fp16 the scaler skips steps whose gradient overflows.
            scaled = name == "grad_norm" and self.accelerator.mixed_precision == "fp16"
            if not math.isfinite(logs.get(name, 0)) and not scaled:
                where = first_non_finite_parameter(self.model) or "no parameter, so it is new"
                self._stop_at_non_finite(what, logs[name], f"{where} (some time since the last log)")
        if "loss" in logs:
            own = torch.tensor(self._agreement.pop_sums(), device=self.args.device)
            total, count = self.accelerator.reduce(own, "sum").tolist()
            if count:
                logs["agreement"] = round(total / count, 4)
            if self._freezer is not None:
                logs["frozen"] = round(self._freezer.frozen_share(), 4)
        super().log(logs, *args, **kwargs)

    # --- evaluation ---

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the student, see the class; warn of a trained one that was better before its first step."""
        metrics = super().evaluate(*args, **kwargs)
        if not self.is_in_train and self._measured_as == "student" and self.is_world_process_zero():
            _warn_of_harm(self.results)
        return metrics

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the loader of all images: `dataloader_drop_last` is of the training."""
        with self._last_batch_kept():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the loader of all images: `dataloader_drop_last` is of the training."""
        with self._last_batch_kept():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _last_batch_kept(self) -> Iterator[None]:
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Run Trainer's loop and replace its loss by exact means over the images; labels are optional."""
        if not is_calibrated(self.model):
            raise InputError("The student has no ranges yet. Call trainer.calibrate() or trainer.train() first.")
        require_planned_layers(self.model, widths=self._progressive is None or not self.is_in_train)
        if self.is_in_train:
            self._require_finite_model()
        self._follow_first_process()  # BatchNorm's statistics are those of each process's own images
        self._evaluated = {}
        with own_random_numbers(self.args.seed):  # loaders draw from the generators that training goes on with
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = {name: mean.pop() for name, mean in self._evaluated.items() if mean}
        teacher_accuracy = means.pop("teacher_accuracy", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        if means:
            loader = args[0] if args else kwargs["dataloader"]
            measured = self._measurements.on(loader.dataset, metric_key_prefix)
            where = {"images": output.num_samples, "set": metric_key_prefix}
            measured.rows["teacher"] = {"accuracy": teacher_accuracy, "agreement": 1.0, "kl": 0.0, **where}
            row = {"accuracy": means.get("accuracy"), "agreement": means["agreement"], "kl": means["loss"], **where}
            measured.rows[self._measured_as] = row = {**row, "step": self._step_of_student}
            if self.is_in_train:
                measured.by_step[self.state.global_step] = row
        return output

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the batch's loss, student logits and labels (`None` without), and keep the sums of the metrics."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        student, teacher = self._predict(model, inputs), self.teacher_prediction(inputs)
        mask = student.mask_of(inputs)
        loss = self._loss(student, teacher, mask, reduction="none")
        counts = student.counted(mask)
        values = {"loss": (loss, counts), "agreement": (_agreement(student, teacher, mask), counts)}
        # Of a batch without labels as well: another process may have one with.
        nothing = torch.zeros_like(loss), torch.zeros_like(counts)
        for name, prediction in (("accuracy", student), ("teacher_accuracy", teacher)):
            values[name] = (None if labels is None else prediction.hits(labels)) or nothing
        for name, (value, counts) in values.items():
            # Drops the images that fill up the last batch of a distributed loader.
            value, counts = self.accelerator.gather_for_metrics((value.to(widest_float(value.device)), counts))
            self._evaluated.setdefault(name, _RunningMean()).add((value * counts).sum(), counts.sum())
        if prediction_loss_only:
            return loss.mean(), None, None
        return loss.mean(), student.logits, labels

    # --- saving ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._require_finite_model()
        folder = self._checkpoint_folder(trial)
        if self.args.should_save and os.path.exists(state := os.path.join(folder, STATE_FILE)):
            os.remove(state)  # written last: a checkpoint that is being written again is not complete
        self._follow_first_process()
        if self.args.delta_estimation_steps and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            deltas = {name: self.model.get_submodule(name).delta for name in _quantizer_names(self.model)}
            with open(os.path.join(folder, DELTAS_FILE), "w", encoding="utf-8") as file:
                json.dump(deltas, file)
        if self._freezer is not None and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            safetensors.torch.save_file(self._freezer.state_dict(), os.path.join(folder, FREEZER_FILE))
        self._format = "latent"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._format = "packed"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        if isinstance(self.model, PreTrainedModel):
            # Training goes on from latents; everyone else gets the packed codes.
            with self.model.hf_quantizer.saving(self._format, state_dict):
                self.model.save_pretrained(folder)
            processor = self.processing_class
            if processor is None and self._format == "packed":
                processor = processor_of(self.model)
            if processor is not None:
                processor.save_pretrained(folder)
        else:
            require_planned_layers(self.model, widths=self._format == "packed")
            # Safetensors takes no kernels in channels-last.
            state = self.model.state_dict() if state_dict is None else state_dict
            super()._save(folder, {name: tensor.contiguous() for name, tensor in state.items()})
        # JSON hides tokens; Trainer's training_args.bin is a pickle that holds them in clear.
        if os.path.exists(pickled := os.path.join(folder, "training_args.bin")):
            os.remove(pickled)
        with open(os.path.join(folder, ARGUMENTS_FILE), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())

    # --- the Hub ---

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Upload the packed student, its image processor and its card, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            `UploadError`: The Hub refused, or the connection broke; the files stay in `args.output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            with upload_errors(self.args.hub_model_id or self.args.output_dir, "Nothing was changed on this side"):
                self.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        self._finish_current_push()  # which reads the files that are written now
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*_listed(kwargs.pop("tags", None)), *_listed(getattr(self.model, "model_tags", None))]
        kwargs.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(tags=list(dict.fromkeys(tags)), **kwargs)
        with upload_errors(self.hub_model_id, f"All files are in {self.args.output_dir!r}"):
            upload = self._hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message=commit_message,
                token=token,
                run_as_future=not blocking,
                ignore_patterns=NOT_UPLOADED,
                revision=self.args.hub_revision if revision is None else revision,
            )
        if not blocking:
            self.push_in_progress = PushInProgress([upload])
        return upload

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the student's card, `README.md` in the output folder, and its report, with what this trainer measured.

        The report is `report.html`, see [`~sqakd_hf.html_report.html_report`]; `training_record.json` holds its
        numbers. A student that is sharded over processes gets none: `sqakd inspect --html` makes it of the saved one.

        The arguments are those of [`~transformers.Trainer.create_model_card`]; `tasks` and `dataset_args` follow from
        the model. A model that is not of transformers gets transformers' own card.
        """
        if not isinstance(self.model, PreTrainedModel):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        elif self.is_world_process_zero():
            folder = self.args.output_dir
            name = self.hub_model_id or model_name or os.path.basename(os.path.abspath(folder))
            os.makedirs(folder, exist_ok=True)
            TrainingRecord(self.results, self.state.log_history, self.layer_sqnr).save(folder)
            record = TrainingRecord.load(folder)  # numbers alone
            curve = "learning_curve.png" if any("loss" in log for log in record.log_history) else None
            report = None if _is_sharded(self.model) else "report.html"
            if report is not None:
                page = html_report(self.model, name, record)
                with open(os.path.join(folder, report), "w", encoding="utf-8") as file:
                    file.write(page)
            if curve is not None:
                plot_learning_curve(record.log_history, os.path.join(folder, curve), name)
            card = model_card(
                self.model,
                name,
                base_model=finetuned_from or self._base_model(),
                results=self.results,
                training_arguments={name: getattr(self.args, name) for name in CARD_ARGUMENTS},
                datasets=_listed(dataset_tags),
                dataset_name=", ".join(_listed(dataset)) or None,
                license=license,
                language=language,
                tags=_listed(tags),
                stored_bytes=weight_bytes(folder) or None,
                learning_curve=curve,
                report=report,
            )
            card.save(os.path.join(folder, "README.md"))

    def _base_model(self) -> str | None:
        teacher = getattr(self.teacher.models[0], "config", None)
        return hub_id(getattr(teacher, "_name_or_path", None)) or self.model.hf_quantizer.base_model

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload while training: the packed student, and the checkpoint itself where `hub_strategy` wants it.

        Trainer's own copies the checkpoint's float latents, and a pickle with the token in it.
        """
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            return
        gathered = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None  # by all processes
        if not self.is_world_process_zero():
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()  # it reads the files that are written now
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._format = "packed"
        self._save(self.args.output_dir, gathered)
        self.create_model_card()
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {progress}"
        upload = functools.partial(
            self._hub.upload_folder,
            repo_id=self.hub_model_id,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
        )
        jobs = [upload(folder_path=self.args.output_dir, commit_message=message, ignore_patterns=NOT_UPLOADED)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            inside = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else os.path.basename(checkpoint_folder)
            jobs.append(
                upload(folder_path=checkpoint_folder, path_in_repo=inside, commit_message=f"{message}, checkpoint")
            )
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        self.push_in_progress = PushInProgress(jobs)


def _warn_of_failure(upload: Future) -> None:
    """Say it when an upload in the background failed: nobody asks for its result."""
    if not upload.cancelled() and (error := upload.exception()) is not None:
        logger.warning("An upload while training did not complete: %s. Training goes on.", reason(error))


def _quantizer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FakeQuantizer)]


def _warn_of_harm(rows: dict[str, dict[str, Any]]) -> None:
    """Say it if the trained student is further from its teacher than it was, on the same images, before training."""
    before, after = rows.get("calibrated"), rows.get("student")
    if before and after and after["agreement"] < before["agreement"] and after["kl"] > before["kl"]:
        logger.warning(
            "Training did harm: the student agrees with its teacher on %.1f %% of these images, before its first "
            "step on %.1f %%. Where the training images are few or of another kind, keep the teacher's BatchNorm "
            "statistics (freeze_batch_norm=True) and lower learning_rate; held-out images and "
            "load_best_model_at_end=True keep the better student.",
            100 * after["agreement"],
            100 * before["agreement"],
        )


def _read_deltas(checkpoint: str | None, estimates: int) -> dict[str, float]:
    """Return what was estimated up to a checkpoint; say it if one of the two trainings estimates and the other not."""
    if not checkpoint:
        return {}
    path = os.path.join(checkpoint, DELTAS_FILE)
    if not os.path.exists(path):
        if estimates:
            logger.warning(
                "%s is of a training without delta_estimation_steps: delta is 0 until it is estimated.", checkpoint
            )
        return {}
    if not estimates:
        logger.warning(
            "%s is of a training with delta_estimation_steps: without it, delta is the quantizers' own again.",
            checkpoint,
        )
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _load_freezer(freezer: OscillationFreezer, folder: str) -> None:
    path = os.path.join(folder, FREEZER_FILE)
    if os.path.exists(path):
        freezer.load_state_dict(safetensors.torch.load_file(path))
    else:
        logger.warning("%s is of a training without oscillation_freezing: no weight is frozen yet.", folder)


class _AtBegin(TrainerCallback):
    """Calls one function as training begins, and another with the number of each epoch that begins or goes on."""

    def __init__(self, training: Callable[[], None], epoch: Callable[[int], None]) -> None:
        self._training, self._epoch = training, epoch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._training()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._epoch(int(state.epoch))


class _AfterOptimizerStep(TrainerCallback):
    """Calls a function with the share of the training that is done, after each step of the optimizer."""

    def __init__(self, act: Callable[[float], None]) -> None:
        self._act = act

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._act((state.global_step + 1) / state.max_steps)


def _forget_preparation(model: nn.Module) -> None:
    """Let accelerate prepare `model` for training, whatever it was prepared for before.

    It marks a model that it prepared for evaluation, copies of it included, and would leave a marked one as it is: not
    wrapped in DDP, so that each process trains a student of its own. What was prepared for half precision also keeps
    an autocast around its forward, inside of any other.
    """
    state = vars(model)
    if state.pop("_is_accelerate_prepared", False) and "_original_forward" in state:
        model.forward = state.pop("_original_forward")


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Context in which `model` computes without the autocast that accelerate keeps around its forward."""
    state = vars(model)
    prepared = state.get("forward") if "_original_forward" in state else None
    if prepared is not None:
        model.forward = state["_original_forward"]
    try:
        yield
    finally:
        if prepared is not None:
            model.forward = prepared


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _agreement(student: Prediction, teacher: Prediction, mask: torch.Tensor | None) -> torch.Tensor:
    return masked_mean((student.classes() == teacher.classes()).float(), mask, "none")


class _RunningMean:
    """A mean whose sum stays on its device until it is asked for: adding never waits for an accelerator."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.count: torch.Tensor | int = 0

    def __bool__(self) -> bool:
        return bool(self.count > 0)

    def add(self, value: torch.Tensor, count: torch.Tensor | int = 1) -> None:
        self.total = self.total + value.detach()
        self.count += count

    def pop_sums(self) -> tuple[float, int]:
        sums = float(self.total), int(self.count)
        self.total, self.count = 0.0, 0
        return sums

    def pop(self) -> float:
        total, count = self.pop_sums()
        return total / count
