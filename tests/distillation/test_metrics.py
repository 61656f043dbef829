import evaluate
import numpy as np
import pytest
import torch

from sqakd_hf.distillation.metrics import TeacherAgreement, TeacherDivergence, TopKAccuracy
from sqakd_hf.errors import InputError


# Four images, three classes. From best to worst: 2 1 0 | 0 1 2 | 1 2 0 | 0 2 1.
LOGITS = [[0.1, 0.5, 0.9], [3.0, 2.0, 1.0], [-5.0, 7.0, 0.0], [4.0, -1.0, 2.0]]
LABELS = [2, 1, 0, 0]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    # `evaluate` writes the batches it collects to files.
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


class TestTopKAccuracy:
    @pytest.mark.parametrize(("k", "expected"), [(1, 0.5), (2, 0.75), (3, 1.0)])
    def test_counts_the_labels_among_the_k_largest(self, k, expected):
        assert TopKAccuracy().compute(predictions=LOGITS, references=LABELS, k=k) == {f"top{k}_accuracy": expected}

    def test_k_is_one_by_default(self):
        assert TopKAccuracy().compute(predictions=LOGITS, references=LABELS) == {"top1_accuracy": 0.5}

    @pytest.mark.parametrize("missing", [-1, -100])
    def test_a_negative_label_is_none(self, missing):
        found = TopKAccuracy().compute(predictions=LOGITS, references=[2, missing, 0, missing])
        assert found == {"top1_accuracy": 0.5}
        with pytest.raises(InputError, match="No image has a label"):
            TopKAccuracy().compute(predictions=LOGITS, references=[missing] * 4)

    def test_equal_logits_count_for_the_first_classes(self):
        # Otherwise a dead network, whose logits are all the same, would be right about every label.
        flat = [[0.0] * 1000] * 4
        assert TopKAccuracy().compute(predictions=flat, references=[0, 0, 1, 999]) == {"top1_accuracy": 0.5}
        assert TopKAccuracy().compute(predictions=flat, references=[0, 1, 998, 999], k=2) == {"top2_accuracy": 0.5}
        assert TopKAccuracy().compute(predictions=flat, references=[0, 3, 4, 999], k=5) == {"top5_accuracy": 0.75}
        saturated = [[float(i % 3) for i in range(1000)]] * 4  # the largest: classes 2, 5, 8 ...
        assert TopKAccuracy().compute(predictions=saturated, references=[2, 5, 8, 998], k=2) == {"top2_accuracy": 0.5}

    @pytest.mark.parametrize("convert", [list, np.asarray, torch.tensor], ids=["list", "numpy", "torch"])
    def test_takes_lists_arrays_and_tensors(self, convert):
        result = TopKAccuracy().compute(predictions=convert(LOGITS), references=convert(LABELS), k=2)
        assert result == {"top2_accuracy": 0.75}
        assert type(result["top2_accuracy"]) is float  # a numpy number would not go into a JSON log

    def test_collects_batches(self):
        metric = TopKAccuracy()
        metric.add_batch(predictions=LOGITS[:1], references=LABELS[:1])
        metric.add_batch(predictions=LOGITS[1:], references=LABELS[1:])
        assert metric.compute() == {"top1_accuracy": 0.5}

    @pytest.mark.parametrize("k", [0, -1, 4, 1.0, "1", True, None])
    def test_a_k_outside_the_classes_is_refused(self, k):
        with pytest.raises(InputError) as error:
            TopKAccuracy().compute(predictions=LOGITS, references=LABELS, k=k)
        assert str(error.value) == f"k must be an integer from 1 to the number of classes, 3, got {k!r}."


class TestTeacherAgreement:
    def test_is_the_share_of_images_with_the_same_first_class(self):
        # The teacher's first classes: 2 1 1 2, the student's: 2 0 1 0.
        teacher = [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        result = TeacherAgreement().compute(predictions=LOGITS, references=teacher)
        assert result == {"agreement": 0.5}
        assert type(result["agreement"]) is float

    def test_is_one_for_the_teacher_itself_at_any_scale_of_its_logits(self):
        scaled = (np.asarray(LOGITS) * 3 + 1).tolist()
        assert TeacherAgreement().compute(predictions=LOGITS, references=scaled) == {"agreement": 1.0}


class TestTeacherDivergence:
    def test_is_zero_for_the_teacher_itself(self):
        assert TeacherDivergence().compute(predictions=LOGITS, references=LOGITS) == {"kl": 0.0}

    @pytest.mark.parametrize("options", [{}, {"temperature": 4.0}, {"temperature": 2}], ids=["default", "4", "2"])
    def test_equals_the_formula_written_out(self, options):
        student, teacher = np.asarray(LOGITS), np.asarray(LOGITS)[::-1]
        t = options.get("temperature", 1.0)
        p_s, p_t = (np.exp(z / t) / np.exp(z / t).sum(1, keepdims=True) for z in (student, teacher))
        expected = t**2 * (p_t * np.log(p_t / p_s)).sum(1).mean()

        result = TeacherDivergence().compute(predictions=LOGITS, references=LOGITS[::-1], **options)

        # 1e-5: the logits pass through float32.
        assert result == {"kl": pytest.approx(expected, rel=1e-5)}
        assert type(result["kl"]) is float

    def test_a_bad_temperature_is_refused(self):
        with pytest.raises(InputError, match=r"^temperature must be a positive number, got 0; the paper uses 4\.$"):
            TeacherDivergence().compute(predictions=LOGITS, references=LOGITS, temperature=0)

    def test_different_numbers_of_classes_are_refused(self):
        with pytest.raises(InputError, match="^The student has 3 classes but the teacher has 2"):
            TeacherDivergence().compute(predictions=LOGITS, references=[row[:2] for row in LOGITS])


@pytest.mark.parametrize(
    ("metric", "references"),
    [(TopKAccuracy, [0, 0]), (TeacherAgreement, [[1.0], [2.0]]), (TeacherDivergence, [[1.0]] * 2)],
)
def test_one_column_is_refused_whoever_could_only_be_right(metric, references):
    with pytest.raises(InputError, match=r"shape \(2, 1\) has fewer than two classes"):
        metric().compute(predictions=[[0.5], [-3.0]], references=references)
