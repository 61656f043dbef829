"""`SQAKDTrainingArguments`: transformers' training arguments, and the few that SQAKD adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .._text import quote
from .._validation import check_integer
from ..errors import InputError
from .extensions import registered_extensions
from .losses import check_temperature
from .teacher import TEACHER_DTYPES


@dataclass
class SQAKDTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with SQAKD's own fields.

    Changed defaults: `remove_unused_columns=False` (the trainer's collator keeps what is needed, and lazily
    transformed datasets stay readable), `ddp_find_unused_parameters=False` (every parameter of a student is used),
    `logging_nan_inf_filter=False` (a loss that is NaN stops the training instead of being hidden, and no step waits
    for an accelerator to look at it).

    Args:
        temperature (`float`, *optional*, defaults to 4.0): Temperature of both distributions, positive.
        quantizer_learning_rate (`float`, *optional*): Learning rate of the quantizers' ranges; by default a hundredth
            of `learning_rate`, as in the paper. Ranges have no weight decay.
        calibration_images (`int`, *optional*, defaults to 512): Number of training images that set the ranges before
            training, drawn at random (the first, of a stream); at least 2. Where the teacher helps
            (`freeze_batch_norm`), 256 of them are used.
        activation_memory (`str`, *optional*, defaults to `"normal"`): With `"low"`, what quantizers put out is
            computed again in the backward instead of kept: the memory of the float network, more time, the same bits.
            A compiled model decides this itself.
        teacher_dtype (`str`, *optional*, defaults to `"auto"`): What the teacher's matrix products and convolutions
            compute in: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"` for what training computes in.
            benchmarks/README.md has the time that bfloat16 saves and the divergence it costs.
        cache_teacher_logits (`str`, *optional*): A folder for the teacher's logits of the training images: computed
            once, in the first training with this teacher and these images, and read from there after that. Images
            must be the same in every epoch; random augmentation is refused, so are streams.
        channels_last (`bool`, *optional*, defaults to `False`): Keep images and kernels of student and teacher in
            channels-last memory format: faster convolutions on most hardware, the same numbers up to rounding.
        objective (`str`, *optional*, defaults to `"kl"`): What training minimises: the divergence of SQAKD, `"kl"`,
            or, to compare with it, a sum with weights such as `"ce"` (labelled training), `"ce + kl"`,
            `"ce + 1000*at"`. `ce` is the cross-entropy with the labels and the only term that reads them; `fitnet`,
            `at`, `sp`, `nst`, `rkd`, `cc`, `pkt`, `fsp` and `squat` compare features with a teacher of the student's
            architecture, see [`~sqakd_hf.research.feature_losses`]. Evaluation reports the divergence all the same.
        feature_layer (`str`, *optional*): The layer whose quantized input the term `squat` compares; by default the
            last block's last but one, see [`~sqakd_hf.research.features.find_lattice_layer`].
        delta_estimation_steps (`int`, *optional*, defaults to 0): Estimate each quantizer's `delta` anew every so many
            optimizer steps, from three batches of training images (drawn as for calibration), without labels, see
            [`~sqakd_hf.research.ewgs_delta.estimate_delta`]; until the first time it is 0. By default `delta` is what
            the quantizer was given.
        reestimate_batch_norm (`int`, *optional*, defaults to 0): At the end of the training, replace BatchNorm's
            running statistics by those of so many training images, drawn as for calibration.
        freeze_batch_norm (`str` or `bool`, *optional*, defaults to `"auto"`): Normalise by the teacher's running
            statistics and keep them. `False` normalises by the batch and learns new statistics: for a teacher that was
            trained on the very images that the student trains on. `"auto"` freezes, unless `reestimate_batch_norm`
            asks for new statistics or the student has no BatchNorm.
        oscillation_dampening (`float`, *optional*, defaults to 0.0): Weight, grown from 0 to this over the training,
            of [`~sqakd_hf.research.oscillation.dampening_loss`], which holds weights near the value they are rounded
            to.
        oscillation_freezing (`float`, *optional*, defaults to 0.0): Freeze weights whose code flips back in more than
            this share of the steps (four times that as training begins); 0: none. See
            [`~sqakd_hf.research.oscillation.OscillationFreezer`].
        output_field (`str`, *optional*): Which of a model's outputs are the class logits, where it has several heads:
            a name such as `"class_queries_logits"`, or a number where it returns a tuple.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns that the model's forward does not take."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP searches for parameters without a gradient in each step."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to hide NaN and infinite losses from the logs."}
    )
    temperature: float = field(
        default=4.0, metadata={"help": "Temperature of the student's and the teacher's distribution."}
    )
    quantizer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the quantizers' ranges; default: a hundredth of learning_rate."},
    )
    calibration_images: int = field(
        default=512, metadata={"help": "Number of training images that set the ranges before training."}
    )
    activation_memory: str = field(
        default="normal",
        metadata={"help": "low: compute quantized tensors again in the backward instead of keeping them."},
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "auto (as training), float32, bfloat16 or float16: what the teacher computes in."},
    )
    cache_teacher_logits: str | None = field(
        default=None,
        metadata={"help": "Folder where the teacher's logits of the training images are computed once and kept."},
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Keep images and kernels in channels-last memory format."}
    )
    objective: str = field(
        default="kl", metadata={"help": "What training minimises, such as kl (SQAKD), ce (labels) or ce + 0.5*kl."}
    )
    feature_layer: str | None = field(
        default=None, metadata={"help": "Layer whose quantized input the term squat of the objective compares."}
    )
    delta_estimation_steps: int = field(
        default=0, metadata={"help": "Estimate the quantizers' delta every so many optimizer steps; 0: never."}
    )
    reestimate_batch_norm: int = field(
        default=0, metadata={"help": "Training images for new BatchNorm statistics at the end of the training."}
    )
    freeze_batch_norm: str = field(
        default="auto",
        metadata={"help": "true: keep the teacher's BatchNorm statistics; false: learn those of the training images."},
    )
    oscillation_dampening: float = field(
        default=0.0, metadata={"help": "Final weight of the term that holds weights near their quantized value."}
    )
    oscillation_freezing: float = field(
        default=0.0,
        metadata={"help": "Share of steps with a flip of its code above which a weight is frozen; 0: off."},
    )
    output_field: str | None = field(
        default=None, metadata={"help": "Which output holds the class logits, for models with several heads."}
    )

    @property
    def freezes_batch_norm(self) -> bool:
        """What `freeze_batch_norm` comes to."""
        return not self.reestimate_batch_norm if self.freeze_batch_norm == "auto" else bool(self.freeze_batch_norm)

    def check_devices(self) -> None:
        """Raise `InputError` where Trainer would copy the student to several GPUs in every step."""
        if self.n_gpu > 1:
            raise InputError(
                f"This process sees {self.n_gpu} GPUs, which Trainer would use by nn.DataParallel; students do not "
                "train with that. Start one process for each GPU, `accelerate launch` does it, or show this one a "
                "single GPU: CUDA_VISIBLE_DEVICES=0."
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        if self.quantizer_learning_rate is None:
            self.quantizer_learning_rate = self.learning_rate / 100
        if self.quantizer_learning_rate < 0:
            raise InputError(f"quantizer_learning_rate must not be negative, got {self.quantizer_learning_rate!r}.")
        check_integer(
            self.calibration_images, "calibration_images", 2, "Batch statistics need two images; use a few hundred."
        )
        check_integer(self.reestimate_batch_norm, "reestimate_batch_norm", least=0, hint="It is a number of images.")
        if self.reestimate_batch_norm == 1:
            raise InputError("reestimate_batch_norm is a number of images, and 1 has no variance. Use a few hundred.")
        truth = {"auto": "auto", "true": True, "false": False}
        stated = str(self.freeze_batch_norm).lower()
        if stated not in truth:
            raise InputError(f"freeze_batch_norm must be 'auto', True or False, got {self.freeze_batch_norm!r}.")
        self.freeze_batch_norm = truth[stated]
        if self.reestimate_batch_norm and self.freeze_batch_norm is True:
            raise InputError("freeze_batch_norm keeps the statistics that reestimate_batch_norm replaces: choose one.")
        if self.teacher_dtype not in ("auto", *TEACHER_DTYPES):
            raise InputError(
                f"teacher_dtype must be 'auto' or one of {quote(TEACHER_DTYPES)}, got {self.teacher_dtype!r}."
            )
        if self.activation_memory not in ("normal", "low"):
            raise InputError(f"activation_memory must be 'normal' or 'low', got {self.activation_memory!r}.")
        for extension in registered_extensions():
            extension.check_arguments(self)
