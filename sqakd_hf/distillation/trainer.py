"""`SQAKDTrainer`: transformers' Trainer whose loss is the KL divergence of student and teacher."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from .._compat import checkpoint_folder, compile_options, forget_preparation, is_sharded, keep_parameters_float32
from ..conversion.convert import require_float32_latents
from ..conversion.student import batch_norms, is_calibrated, require_planned_layers
from ..data.collator import LOGITS, ImageCollator
from ..data.reproducible import own_random_numbers
from ..errors import InputError
from ..hub.loading import load_model
from ..hub.model_preprocessing import record_processor
from ..layers.shared_weights import SharedWeights
from ..outputs.forward import Prediction, predict
from ..quantization.recompute import recompute_quantized
from .best_student import BestStudent
from .callbacks import StepCallback
from .checkpoint import discard_state, is_complete, last_checkpoint
from .evaluation import EvaluationSums, RunningMean, agreement
from .extensions import Extension, load_extensions, requested_extensions
from .interrupt import InterruptCallback
from .last_batch import check_last_batch
from .losses import box_loss, distillation_loss
from .measurements import Measurements
from .measuring import MeasuringMixin
from .nan_diagnostics import FiniteWatch
from .pairing import require_student
from .parameter_groups import ranges_of, set_aside, warn_of_missing
from .preparing import PreparingMixin
from .processes import follow_first_process
from .publishing import PublishingMixin, save_arguments, save_student
from .teacher import Teacher, teacher_dtype
from .training_args import SQAKDTrainingArguments
from .training_images import TrainingImages
from .trials import TrialsMixin


class SQAKDTrainer(PreparingMixin, MeasuringMixin, PublishingMixin, TrialsMixin, Trainer):
    """Distil a quantized student from its full-precision teacher, on images without labels.

    The loss is [`distillation_loss`] of the two models' logits on the same batch and nothing else (unless
    `args.objective` asks for labels or features, to compare with that), whether they are
    one set an image, one a pixel (segmentation; pixels where the batch's `valid_mask` is `False` are left out) or one
    a query. A detector's boxes, which are no distribution, add their
    [`~sqakd_hf.distillation.losses.box_loss`]. Labels in the batch never reach that loss; `evaluate` uses them, where
    they exist, to add the accuracy.

    Args:
        model (`nn.Module`): The student, after [`quantize_model`]; a transformers model, or a timm (or any other)
            module that takes images `(B, C, H, W)` and returns logits `(B, K)`. If it has no ranges yet, `train`
            calibrates it first. `None` with `model_init`, which makes one for each training.
        teacher_model (`nn.Module`, `str` or a list of them): The full-precision model, or a name for
            [`load_model`]; of any architecture with the same classes. The student learns the mean of the
            distributions of several; a detector has one, which it was copied from. Teachers stay outside the student:
            in eval mode, without gradients, neither saved nor optimised.
        args (`SQAKDTrainingArguments`, *optional*): Training arguments.
        train_dataset, eval_dataset: Datasets that yield `pixel_values` `(C, H, W)` and, optionally, `labels`.
        **kwargs: All else that [`~transformers.Trainer`] takes.

    Raises:
        `InputError`: No teacher, a student that is not quantized or was changed after that, a teacher that is
            quantized or the student itself, a different number of classes, a model without class logits.

    `evaluate()` returns `eval_loss` (the KL loss, as in training), `eval_kl` (the KL divergence at temperature 1),
    `eval_agreement` (share of images where student and teacher name the same class) and, where the dataset has
    labels, `eval_accuracy`; exact means over the images, whatever the batch size and the number of processes.
    `metric_for_best_model` takes any of them.
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
        self._teachers = [load_model(teacher) if isinstance(teacher, str) else teacher for teacher in given]
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
        self._compile_options = compile_options(self.accelerator)
        self.teacher = Teacher(
            self._teachers,
            args.device,
            teacher_dtype(args.teacher_dtype, self.accelerator.mixed_precision),
            args.channels_last,
            compile_options=self._compile_options,
        )
        self.best = BestStudent(self)
        self._watch = FiniteWatch(self, lambda inputs: self._predict(self.model, inputs))
        self._images = TrainingImages(self)
        self.add_callback(StepCallback(self, self._images))
        self._hub = HfApi()  # one: it uploads in the background one after the other
        self._format = "packed"

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_parameters_float32(self.accelerator)

    def _take_student(self, model: nn.Module) -> None:
        """Refuse a model that can't be this trainer's student; keep nothing of the student before."""
        require_student(model, self._teachers)
        for each in (model, *self._teachers):
            forget_preparation(each)
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)
        self.measurements = Measurements()
        self.layer_sqnr: dict[str, dict[str, float]] = {}
        self.extensions: list[Extension] = []
        self._frozen_norms: list[nn.Module] = []
        self._stage: str | None = None  # what was made of it here, before a training
        self._agreement = RunningMean()

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
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, InterruptCallback):
                    callback.close()  # an error comes without on_train_end
            for extension in self.extensions:
                extension.close()
        self.best.after_training()
        return output

    def _get_ready(self) -> None:
        """Let the student and what goes with it begin a training."""
        require_planned_layers(self.model)
        require_float32_latents(self.model)
        if self._checkpoint is None and not is_calibrated(self.model):
            self.calibrate()
        self.model.train()  # a student loaded from codes becomes latent before it is spread over devices
        self.extensions = requested_extensions(self)
        self._check_options()
        if self._checkpoint is None:
            self.measurements.begin_training(self._stage or "calibrated")
        self.best.warn_if_not_chosen()
        self._agreement = RunningMean()
        load_extensions(self.extensions, self._checkpoint)
        self._shared_weights = SharedWeights(self.model)
        if self.model_wrapped is self.model:
            forget_preparation(self.model)

    def _check_options(self) -> None:
        """Refuse, before the first step, options that this model or this way of running it has no use for."""
        for extension in self.extensions:
            if extension.needs_whole_weights and self._shards_weights():
                raise InputError(f"{extension} needs whole weights: it does not work where they are sharded.")
            extension.check()
        norms = batch_norms(self.model)
        for option in ("reestimate_batch_norm", "freeze_batch_norm"):
            if getattr(self.args, option) not in (0, "auto") and not norms:
                raise InputError(f"{option}: the student has no BatchNorm.")
        self._frozen_norms = norms if self.args.freezes_batch_norm else []
        if not self._frozen_norms:
            check_last_batch(self.model, self.args, self.train_dataset, self.data_collator)

    def _get_dataloader(self, dataset: Dataset, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        dataset = self._images.as_trained(dataset) if is_training else dataset
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    # --- the path of a batch: prepare, student, teacher, loss ---

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return the context of a training batch's loss: frozen BatchNorm stays frozen, extensions watch."""
        stack = super().compute_loss_context_manager()
        for module in self._frozen_norms:
            module.eval()
        for extension in self.extensions:
            stack.enter_context(extension.watching())
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return `T² · KL(teacher ‖ student)`, the mean over the batch; with `return_outputs` also the logits.

        Extensions, such as an `objective` to compare with, may return another loss.
        """
        student, teacher = self._predict(model, inputs), self.teacher_prediction(inputs)
        mask = student.mask_of(inputs)
        loss = self.kl_loss(student, teacher, mask)
        for extension in self.extensions:
            loss = extension.loss(loss, student, inputs)
        if model.training:
            counts = student.counted(mask)
            self._agreement.add((agreement(student, teacher, mask) * counts).sum(), counts.sum())
            self._watch.check_loss(loss, inputs)
        return (loss, {"logits": student.logits, "teacher_logits": teacher.logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute loss and gradients of a batch; on a CPU, stop where a gradient is not finite."""
        if self.args.cache_teacher_logits is not None and LOGITS not in inputs:
            raise InputError(f"The data_collator dropped {LOGITS!r}, which cache_teacher_logits adds to each image.")
        with self._weights_quantized_once():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._watch.check_gradients()
        return loss

    def _weights_quantized_once(self) -> contextlib.AbstractContextManager:
        """Share the quantized weights between the batches whose gradients are accumulated."""
        # A compiled model decides itself what is computed when; sharded weights are whole only while they are used;
        # and DDP may want a gradient of every parameter in every batch, or know which have none.
        ddp = self.args.world_size > 1 and (
            self.args.ddp_find_unused_parameters
            or (self.args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch")
        )
        compiled = self._compile_options is not None
        if self.args.gradient_accumulation_steps == 1 or compiled or ddp or self._shards_weights():
            return contextlib.nullcontext()
        return self._shared_weights.batch(is_last=self.accelerator.sync_gradients)

    def _shards_weights(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.model)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last and inputs["pixel_values"].dim() == 4:
            inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return inputs

    def _predict(self, model: nn.Module, inputs: dict[str, Any]) -> Prediction:
        low_memory = self.args.activation_memory == "low"
        # accelerate wraps the forward of other models in autocast, but not of those that FSDP2 shards.
        with self.accelerator.autocast(), recompute_quantized() if low_memory else contextlib.nullcontext():
            return predict(model, inputs, self.args.output_field)

    def kl_loss(
        self, student: Prediction, teacher: Prediction, mask: torch.Tensor | None, reduction: str = "mean"
    ) -> torch.Tensor:
        """Return [`distillation_loss`] of the logits, and of a detector's boxes their distance beside it."""
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Group the parameters: decayed weights, other weights, and ranges with their own rate and no decay."""
        ranges = ranges_of(self.model if model is None else model)
        if self.optimizer is not None:
            if isinstance(self.optimizer, torch.optim.Optimizer):  # DeepSpeed's stand-in has no groups yet
                warn_of_missing(self.optimizer, self.model, ranges)
            return self.optimizer
        with set_aside(ranges):
            super().create_optimizer(*(() if model is None else (model,)))
        if ranges:
            # Last: Trainer logs the learning rate of the first group.
            group = {"params": ranges, "lr": self.args.quantizer_learning_rate, "weight_decay": 0.0}
            self.optimizer.add_param_group(group)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay matrices and kernels; not biases, nor the vectors of any normalisation."""
        names = set(super().get_decay_parameter_names(model))
        return [name for name, parameter in model.named_parameters() if name in names and parameter.dim() > 1]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to training logs the agreement with the teacher since the last one, and what extensions tell.

        To be called by all processes.
        """
        self._watch.check_logs(logs)
        if "loss" in logs:
            own = torch.tensor(self._agreement.pop_sums(), device=self.args.device)
            total, count = self.accelerator.reduce(own, "sum").tolist()
            if count:
                logs["agreement"] = round(total / count, 4)
            for extension in self.extensions:
                logs.update(extension.logs())
        super().log(logs, *args, **kwargs)

    # --- evaluation ---

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Run Trainer's loop and replace its loss by exact means over the images; labels are optional."""
        if not is_calibrated(self.model):
            raise InputError("The student has no ranges yet. Call trainer.calibrate() or trainer.train() first.")
        require_planned_layers(self.model)
        if self.is_in_train:
            self._watch.check_model()
        # BatchNorm's statistics are those of each process's own images.
        follow_first_process(self.model, self.args.world_size)
        self._sums = EvaluationSums(self.accelerator)
        with own_random_numbers(self.args.seed):  # loaders draw from the generators that training goes on with
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._sums.means()
        if means:
            loader = args[0] if args else kwargs["dataloader"]
            where = {"images": output.num_samples, "set": metric_key_prefix}
            measured = self.measurements.on(loader.dataset, metric_key_prefix)
            teacher_accuracy = means.pop("teacher_accuracy", None)
            measured.add(
                means,
                teacher_accuracy,
                where,
                self._measured_as,
                self._stage_of_student,
                self._step_of_student,
                self.is_in_train,
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
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
        loss = self.kl_loss(student, teacher, mask, reduction="none")
        self._sums.add(loss, student, teacher, mask, labels)
        if prediction_loss_only:
            return loss.mean(), None, None
        return loss.mean(), student.logits, labels

    # --- saving ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._watch.check_model()
        folder = checkpoint_folder(self, trial)
        follow_first_process(self.model, self.args.world_size)
        if self.args.should_save:
            discard_state(folder)  # written last: a checkpoint that is being written again is not complete
            os.makedirs(folder, exist_ok=True)
            for extension in self.extensions:
                extension.save(folder)
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
            save_student(self.model, self.processing_class, folder, self._format, state_dict)
        else:
            require_planned_layers(self.model)
            # Safetensors takes no kernels in channels-last.
            state = self.model.state_dict() if state_dict is None else state_dict
            super()._save(folder, {name: tensor.contiguous() for name, tensor in state.items()})
        save_arguments(self.args, folder)
