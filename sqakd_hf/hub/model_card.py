"""The model card of a student: what it is, what it was measured at, how to load it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..conversion.plan import QuantizationPlan, bits_of
from ..data.hub_access import hub_is_reachable
from ..reporting.tables import image_count, kept_stage, titled_rows


TAGS = ("sqakd", "sqakd_hf", "quantization", "quantization-aware-training", "knowledge-distillation")
_TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForUniversalSegmentation": "image-segmentation",
    "AutoModelForInstanceSegmentation": "image-segmentation",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForZeroShotObjectDetection": "zero-shot-object-detection",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForKeypointDetection": "keypoint-detection",
    "AutoModelForImageToImage": "image-to-image",
    "AutoModelForMaskGeneration": "mask-generation",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForMaskedImageModeling": "image-feature-extraction",
}
_METRICS = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("agreement", "agreement with the teacher", "{:.2%}"),
    ("kl", "KL divergence", "{:.4f}"),
)
_STAGES = {
    "calibrated": "calibrated on images without labels.",
    "reconstructed": "reconstructed block by block, on images without labels: each block learned to put out what the "
    "float network's does.",
}
_TRIED = (
    " A training by [SQAKD](https://arxiv.org/abs/2403.11106) was tried; no step of it was better on held-out images, "
    "so that this is the student before its first step."
)
_LOAD = """\
import sqakd_hf  # registers the format: without it, loading stops with an error
from transformers import {auto_class}{extra}

model = {auto_class}.from_pretrained("{repo_id}")
"""


def model_card(
    model: PreTrainedModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    results: Mapping[str, Mapping[str, float | None]] | None = None,
    training_arguments: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    dataset_name: str | None = None,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
    stored_bytes: int | None = None,
    learning_curve: str | None = None,
    report: str | None = None,
    with_labels: bool = False,
) -> ModelCard:
    """Write the card of a student.

    Args:
        model (`PreTrainedModel`): The student.
        repo_id (`str`): Where it is loaded from: the name in the load snippet.
        base_model (`str`, *optional*): Hub id of the full-precision model.
        results (`Mapping`, *optional*): See [`~sqakd_hf.reporting.training_record.TrainingRecord`]; only what this
            run measured. `None` marks what was not.
        training_arguments (`Mapping`, *optional*): Name → value.
        datasets (`Sequence[str]`, *optional*): Hub ids of the training images.
        dataset_name (`str`, *optional*): Their name for people.
        license (`str`, *optional*): Defaults to the license of `base_model`, where the Hub can be asked.
        language, tags (*optional*): Further metadata.
        stored_bytes (`int`, *optional*): Size of the saved weight files.
        learning_curve, report (`str`, *optional*): Names of files beside the card: a picture to show, and the page of
            [`~sqakd_hf.reporting.html_report.html_report`].
        with_labels (`bool`, *optional*, defaults to `False`): Whether the objective read labels.

    Returns:
        `ModelCard`: With metadata that the Hub understands, `model-index` included where results are known.
    """
    plan: QuantizationPlan = model.quantization_plan
    objective = str((training_arguments or {}).get("objective", "kl"))
    bits = plan.bits()
    name = repo_id.split("/")[-1]
    auto_class, pipeline_tag = _task(model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=license or _license_of(base_model),
        language=language,
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        datasets=list(datasets) or None,
        tags=list(dict.fromkeys([*TAGS, bits.lower(), *tags])),
        model_name=name,
        eval_results=_eval_results(results, pipeline_tag, datasets, dataset_name) or None,
    )
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    origin = link if base_model else f"A network of architecture `{_architecture(model)}`"
    extra = ", pipeline" if pipeline_tag == "image-classification" else ""
    snippet = _LOAD.format(auto_class=auto_class, repo_id=repo_id, extra=extra)
    if extra:
        snippet += f'classifier = pipeline("image-classification", "{repo_id}")\n'
    images = dataset_name or ", ".join(datasets) or None
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        f"{origin} with {bits} weights and activations (bits of most of its weights), "
        + _made(results, objective, with_labels),
        f"## Load it\n\n```bash\npip install sqakd_hf\n```\n\n```python\n{snippet}```",
        "## Results\n\n" + _results(results, images) + _files(learning_curve, report),
        "## Size\n\n" + _size(model, stored_bytes),
        "## Bits\n\n" + _bits(plan),
        "## Training\n\n" + _training(training_arguments, with_labels, images),
    ]
    return ModelCard("\n\n".join(sections) + "\n", ignore_metadata_errors=False)


def _results(results: Mapping[str, Mapping[str, float | None]] | None, dataset: str | None) -> str:
    if not results:
        return "Not measured in the run that wrote this card."
    rows = [["", *(title for _, title, _ in _METRICS), "images"]]
    for key, title in titled_rows(results):
        row = results.get(key, {})
        cells = [form.format(row[name]) if row.get(name) is not None else "-" for name, _, form in _METRICS]
        rows.append([title, *cells, image_count(row)])
    where = f" on images of {dataset}" if dataset else ""
    return f"Measured by the run that trained this student{where}; `-`: not measured.\n\n{_table(rows)}"


def _files(learning_curve: str | None, report: str | None) -> str:
    text = ""
    if learning_curve is not None:
        text += f"\n\n![The divergence and the agreement during the training]({learning_curve})"
    if report is not None:
        text += (
            f"\n\nDownload [{report}]({report}) and open it for the codes of each layer's weights and, where the "
            "training measured them, the layers' errors before and after."
        )
    return text


def _size(model: PreTrainedModel, stored_bytes: int | None) -> str:
    float_bytes = sum(
        tensor.numel() * 4 if tensor.is_floating_point() else tensor.nbytes
        for name, tensor in model.state_dict().items()
        if "_quantizer." not in name
    )
    if stored_bytes is None:
        return f"The float32 weights take {float_bytes:,} bytes."
    return (
        f"The weight files take {stored_bytes:,} bytes, the float32 weights {float_bytes:,}: "
        f"{float_bytes / stored_bytes:.1f} times less. Weights are stored as integer codes of exactly their bits."
    )


def _bits(plan: QuantizationPlan) -> str:
    layers, weights = Counter(), Counter()
    for layer in plan:
        bits = "float" if layer.skipped else bits_of(layer)
        layers[bits] += 1
        weights[bits] += layer.num_weights
    total = max(sum(weights.values()), 1)
    rows = [["bits", "layers", "weights", "share"]]
    rows += [[bits, str(layers[bits]), f"{n:,}", f"{n / total:.1%}"] for bits, n in weights.most_common()]
    return f"{_table(rows)}\n\n<details><summary>Layer by layer</summary>\n\n```\n{plan}\n```\n\n</details>"


def _made(results: Mapping[str, Mapping[str, Any]] | None, objective: str, with_labels: bool) -> str:
    kept = kept_stage(results)
    if kept is None:
        return f"trained {_method(objective, with_labels)}"
    return _STAGES[kept] + (_TRIED if results["student"]["step"] == 0 else "")


def _method(objective: str, with_labels: bool) -> str:
    if objective == "kl":
        return (
            "by self-supervised quantization-aware knowledge distillation "
            "([SQAKD](https://arxiv.org/abs/2403.11106)): the only loss is the divergence from the full-precision "
            "teacher's logits, and no labels are used."
        )
    labels = "with" if with_labels else "without"
    return f"by quantization-aware training {labels} labels: the loss is `{objective}` (`kl`: SQAKD's divergence)."


def _training(arguments: Mapping[str, Any] | None, with_labels: bool, dataset: str | None) -> str:
    labels = "with" if with_labels else "without"
    images = f"Images: {dataset}, {labels} labels." if dataset else "The training images were not recorded."
    if not arguments:
        return images
    return f"{images}\n\n" + _table([["argument", "value"], *([f"`{k}`", f"`{v}`"] for k, v in arguments.items())])


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _eval_results(results, task: str, datasets: Sequence[str], dataset_name: str | None) -> list[EvalResult]:
    student = (results or {}).get("student", {})
    return [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0] if datasets else "images",
            dataset_name=dataset_name or (datasets[0] if datasets else "held-out images"),
            metric_type=name,
            metric_name=title,
            metric_value=student[name],
        )
        for name, title, _ in _METRICS
        if student.get(name) is not None
    ]


def _task(model: PreTrainedModel) -> tuple[str, str]:
    """Return the Auto class whose mapping gives this model's class for its config, and the Hub's name of the task."""
    for auto_class, task in _TASKS.items():
        found = getattr(transformers, auto_class)._model_mapping.get(type(model.config), ())
        if type(model) in (found if isinstance(found, tuple) else (found,)):
            return auto_class, task
    return "AutoModel", "image-feature-extraction"


def _architecture(model: PreTrainedModel) -> str:
    return getattr(model.config, "architecture", None) or type(model).__name__


def _license_of(base_model: str | None) -> str | None:
    if base_model is None or not hub_is_reachable():
        return None
    try:
        card = huggingface_hub.model_info(base_model).card_data
    except (OSError, ValueError):  # no such repository, or none of ours to see
        return None
    return card.license if card is not None else None
