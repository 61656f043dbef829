"""`SQAKDTrainingArguments`: transformers' training arguments, and the few that SQAKD adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .errors import InputError
from .losses import check_temperature


@dataclass
class SQAKDTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with SQAKD's own fields.

    Changed defaults: `remove_unused_columns=False` (the trainer's collator keeps what is needed, and lazily
    transformed datasets stay readable), `ddp_find_unused_parameters=False` (every parameter of a student is used).

    Args:
        temperature (`float`, *optional*, defaults to 4.0): Temperature of both distributions, positive.
        quantizer_learning_rate (`float`, *optional*): Learning rate of the quantizers' ranges; by default a hundredth
            of `learning_rate`, as in the paper. Ranges have no weight decay.
        calibration_images (`int`, *optional*, defaults to 512): Number of training images that set the ranges before
            training, the first of the training set.
        activation_memory (`str`, *optional*, defaults to `"normal"`): With `"low"`, what quantizers put out is
            computed again in the backward instead of kept: the memory of the float network, more time, the same bits.
            A compiled model decides this itself.
        output_field (`str`, *optional*): Which of a model's outputs are the class logits, where it has several heads:
            a name such as `"class_queries_logits"`, or a number where it returns a tuple.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns that the model's forward does not take."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP searches for parameters without a gradient in each step."}
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
        if self.activation_memory not in ("normal", "low"):
            raise InputError(f"activation_memory must be 'normal' or 'low', got {self.activation_memory!r}.")
