"""Measure a student, or its ONNX file, on images: accuracy, and agreement with its teacher.

    sqakd evaluate sqakd-output --dataset digits
    sqakd evaluate sqakd-output --dataset path/to/images --teacher sqakd-output/teacher --json
    sqakd evaluate student.onnx --dataset fashion_mnist --max_images 1000

Accuracy needs labels, the agreement and the divergence need --teacher and no label.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.collator import ImageCollator
from ..data.dataset import ImageData, load_image_data
from ..data.labels import is_labelled
from ..distillation.losses import check_same_classes
from ..distillation.metrics import TeacherAgreement, TeacherDivergence, TopKAccuracy
from ..hub.loading import load_model, num_classes
from ..hub.model_preprocessing import preprocessing
from ..hub.preprocessing import Preprocessing
from ..outputs.forward import predict
from ..reporting.training_record import to_json
from .students import class_names, expected_transform, load_student


Predictor = Callable[[torch.Tensor], np.ndarray]


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "sqakd evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id of a saved student, or an exported .onnx file")
    parser.add_argument("--dataset", default="digits", help="as in sqakd distill; its test images count")
    parser.add_argument("--label_column", help="column of the labels, where a dataset has several")
    parser.add_argument("--teacher", help="folder or Hub id of the model to agree with")
    parser.add_argument("--max_images", type=int, help="use so many test images; default: as in the distillation")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, help="of the split; default: as in the distillation, else 42")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    predictor, expected, classes = (_onnx if options.model.endswith(".onnx") else _student)(options.model)
    teacher = None
    if options.teacher is not None:
        teacher_model = load_model(options.teacher)
        check_same_classes(len(classes), num_classes(teacher_model))
        teacher = _predictor(teacher_model)
    data = _load_data(options).numbered_like(classes)
    loader = DataLoader(
        data.test.with_transform(expected_transform(expected)), options.batch_size, collate_fn=ImageCollator()
    )
    logits, references, labels = [], [], []
    for batch in tqdm(loader, "Evaluating", unit="batch", leave=False):
        logits.append(predictor(batch["pixel_values"]))
        references += [] if teacher is None else [teacher(batch["pixel_values"])]
        labels += [batch["labels"].numpy()] if is_labelled(data.test) else []
    results: dict[str, float | int] = {"images": len(data.test)}
    predictions = np.concatenate(logits)
    if labels:
        accuracy = TopKAccuracy().compute(predictions=predictions, references=np.concatenate(labels))
        results["accuracy"] = accuracy["top1_accuracy"]
    if references:
        for metric in (TeacherAgreement(), TeacherDivergence()):
            results |= metric.compute(predictions=predictions, references=np.concatenate(references))
    print(to_json(results) if options.json else "\n".join(f"{k}: {v:.6g}" for k, v in results.items()))


def _load_data(options: argparse.Namespace) -> ImageData:
    """Load the images; of a dataset that the student was distilled with, those that were tested on then."""
    try:
        used = json.loads(Path(options.model, "results.json").read_text())["arguments"]
    except (OSError, ValueError, LookupError):
        used = {}  # an exported file, a student of the Hub or of another program
    if os.path.abspath(used.get("dataset", "")) != os.path.abspath(options.dataset):
        used = {}
    given = {"label_column": options.label_column, "max_test_images": options.max_images, "seed": options.seed}
    chosen = {
        "label_column": used.get("label_column"),
        "test_dataset": used.get("test_dataset"),
        "max_test_images": used.get("max_test_images"),
        "seed": used.get("training", {}).get("seed", 42),
        **{name: value for name, value in given.items() if value is not None},
    }
    return load_image_data(options.dataset, **chosen)


def _student(name: str) -> tuple[Predictor, Preprocessing, list[str]]:
    model = load_student(name)
    return _predictor(model), preprocessing(model), class_names(model)


def _predictor(model: torch.nn.Module) -> Predictor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)

    @torch.inference_mode()
    def run(images: torch.Tensor) -> np.ndarray:
        return predict(model, {"pixel_values": images.to(device)}).logits.float().cpu().numpy()

    return run


def _onnx(path: str) -> tuple[Predictor, Preprocessing, list[str]]:
    from ..export import open_session

    session, expected = open_session(path)
    classes = json.loads(session.get_modelmeta().custom_metadata_map["sqakd.labels"])
    return (lambda images: session.run(["logits"], {"pixel_values": images.numpy()})[0]), expected, classes
