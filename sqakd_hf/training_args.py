"""`SQAKDTrainingArguments`: transformers' training arguments, and the few that SQAKD adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .errors import InputError, quote
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
            training, the first of the training set.
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
    output_field: str | None = field(
        default=None, metadata={"help": "Which output holds the class logits, for models with several heads."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        if self.quantizer_learning_rate is None:
            self.quantizer_learning_rate = self.learning_rate / 100
        if self.quantizer_learning_rate < 0:
            raise InputError(f"quantizer_learning_rate must not be negative, got {self.quantizer_learning_rate!r}.")
        if self.calibration_images < 1:
            raise InputError(f"calibration_images must be at least 1, got {self.calibration_images!r}.")
        if self.teacher_dtype not in ("auto", *TEACHER_DTYPES):
            raise InputError(
                f"teacher_dtype must be 'auto' or one of {quote(TEACHER_DTYPES)}, got {self.teacher_dtype!r}."
            )
        if self.activation_memory not in ("normal", "low"):
            raise InputError(f"activation_memory must be 'normal' or 'low', got {self.activation_memory!r}.")
