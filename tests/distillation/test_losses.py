import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqakd_hf.distillation.losses import (
    box_loss,
    check_same_classes,
    check_temperature,
    distillation_loss,
    mean_teacher_logits,
)
from sqakd_hf.errors import InputError
from tests.helpers.vectors import VECTORS as all_vectors


# L = T^2 / B sum_b sum_k p_t log(p_t / p_s), dL/dz_s = T (p_s - p_t) / B: computed in float64 numpy.
CASES = [case for case in all_vectors if case["id"].startswith("sqakd_kl_")]


def logits(seed, shape=(6, 5), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


class TestReferenceVectors:
    def test_both_temperatures_are_there(self):
        assert [case["inputs"]["T"] for case in CASES] == [1.0, 4.0]

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
    def test_value_and_gradient_equal_the_formula(self, case):
        student = torch.tensor(case["inputs"]["student_logits"], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor(case["inputs"]["teacher_logits"], dtype=torch.float64)

        loss = distillation_loss(student, teacher, case["inputs"]["T"])
        loss.backward()

        # 1e-9: float64 on both sides.
        assert loss.item() == pytest.approx(case["expect"]["loss"], rel=0, abs=1e-9)
        expected = torch.tensor(case["expect"]["grad_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-9)


class TestDistillationLoss:
    @pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20.0])
    def test_is_exactly_zero_for_identical_logits(self, temperature):
        z = logits(0, dtype=torch.float32)
        assert distillation_loss(z, z.clone(), temperature).item() == 0.0

    def test_uses_the_temperature_of_the_paper_by_default(self):
        student, teacher = logits(0), logits(1)
        assert torch.equal(distillation_loss(student, teacher), distillation_loss(student, teacher, 4.0))

    def test_none_gives_one_value_an_image_and_mean_their_mean(self):
        student, teacher = logits(0), logits(1)
        p_s, p_t = softmax(student.numpy() / 3), softmax(teacher.numpy() / 3)
        expected = torch.from_numpy(9 * (p_t * np.log(p_t / p_s)).sum(1))

        each = distillation_loss(student, teacher, 3.0, reduction="none")

        # 1e-12: a few float64 roundings in another order.
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(distillation_loss(student, teacher, 3.0), each.mean())

    def test_gradient_is_the_derivative(self):
        student, teacher = logits(0).requires_grad_(), logits(1)
        for temperature in (0.5, 4.0):
            for reduction in ("mean", "none"):
                assert torch.autograd.gradcheck(
                    lambda z, t=temperature, r=reduction: distillation_loss(z, teacher, t, r), (student,)
                )

    def test_no_gradient_reaches_the_teacher(self):
        student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
        distillation_loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits_are_compared_in_float32(self, dtype):
        student, teacher = logits(0, dtype=dtype).requires_grad_(), logits(1, dtype=dtype)

        loss = distillation_loss(student, teacher)
        loss.backward()

        assert loss.dtype == torch.float32
        assert torch.equal(loss, distillation_loss(student.detach().float(), teacher.float()))
        assert student.grad.dtype == dtype

    def test_autocast_changes_nothing(self):
        student, teacher = logits(0, dtype=torch.float32), logits(1, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = distillation_loss(student, teacher)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, distillation_loss(student, teacher))

    def test_stays_finite_where_a_class_has_no_probability_left(self):
        student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        loss = distillation_loss(student, torch.tensor([[-1e4, 1e4, 0.0]]), temperature=1.0)
        loss.backward()
        # The teacher is certain of class 1, which the student puts 2e4 below its own choice.
        assert loss.item() == pytest.approx(2e4, rel=1e-6)
        assert student.grad.isfinite().all()

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.floats(-20, 20), min_size=3, max_size=3),
        st.lists(st.floats(-20, 20), min_size=3, max_size=3),
        st.floats(0.1, 50),
        st.floats(-50, 50),
    )
    def test_is_never_negative_and_ignores_a_shift_of_the_logits(self, student, teacher, temperature, shift):
        student, teacher = torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64)
        loss = distillation_loss(student, teacher, temperature).item()
        # Tolerances: float64 rounding of logits up to 70 / T, multiplied by T^2.
        assert loss >= -1e-10 * temperature**2
        shifted = distillation_loss(student + shift, teacher - shift, temperature).item()
        assert shifted == pytest.approx(loss, rel=1e-9, abs=1e-10 * temperature**2)


class TestErrors:
    @pytest.mark.parametrize(
        "temperature", [0, 0.0, -1, -0.5, float("nan"), float("inf"), float("-inf"), "hot", None, True]
    )
    def test_a_temperature_that_is_not_positive_and_finite_is_refused(self, temperature):
        message = f"temperature must be a positive number, got {temperature!r}; the paper uses 4."
        with pytest.raises(InputError) as error:
            check_temperature(temperature)
        assert str(error.value) == message
        with pytest.raises(InputError) as error:
            distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature)
        assert str(error.value) == message

    @pytest.mark.parametrize("temperature", [1, 4.0, 1e-3])
    def test_a_positive_temperature_is_accepted(self, temperature):
        assert check_temperature(temperature) is None

    def test_different_numbers_of_classes_are_explained(self):
        message = (
            "The student has 3 classes but the teacher has 5. Distillation compares the distributions class by class: "
            "use a teacher trained on the student's classes."
        )
        with pytest.raises(InputError) as error:
            check_same_classes(3, 5)
        assert str(error.value) == message
        with pytest.raises(InputError) as error:
            distillation_loss(torch.zeros(2, 3), torch.zeros(2, 5))
        assert str(error.value) == message

    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [
            (
                (2,),
                (2, 2),
                "must both be (batch, classes), (batch, classes, height, width) or (batch, queries, classes)",
            ),
            ((2, 2), (2,), "must both be (batch, classes)"),
            ((2, 3), (2, 3, 1), "must both be (batch, classes)"),
            ((2, 3), (4, 3), "must have the same shape"),
            ((2, 3, 4, 4), (2, 3, 8, 8), "must have the same shape"),
        ],
    )
    def test_shapes_that_do_not_match_are_named(self, student, teacher, message):
        with pytest.raises(InputError) as error:
            distillation_loss(torch.zeros(student), torch.zeros(teacher))
        assert message in str(error.value) and f"got {student} and {teacher}." in str(error.value)

    @pytest.mark.parametrize("shape", [(3, 1), (3, 1, 4, 4), (3, 4, 1)])
    def test_one_class_is_no_distribution(self, shape):
        with pytest.raises(InputError, match=r"has fewer than two classes\. Distillation compares"):
            distillation_loss(torch.zeros(shape), torch.ones(shape))

    def test_an_unknown_reduction_is_refused(self):
        with pytest.raises(InputError, match=r"^reduction must be 'mean' or 'none', got 'sum'\.$"):
            distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), reduction="sum")


class TestManyPositions:
    """Every position is one distribution: the dense forms equal the plain one on positions laid out as a batch."""

    def logits(self, *shape):
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]

    def test_pixels(self):
        student, teacher = self.logits(2, 5, 3, 4)
        flat = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
        each = distillation_loss(*flat, reduction="none").view(2, -1)
        torch.testing.assert_close(distillation_loss(student, teacher), each.mean())
        torch.testing.assert_close(distillation_loss(student, teacher, reduction="none"), each.mean(1))

    def test_queries(self):
        student, teacher = self.logits(2, 7, 5)
        flat = [x.reshape(-1, 5) for x in (student, teacher)]
        torch.testing.assert_close(distillation_loss(student, teacher), distillation_loss(*flat))

    def test_a_mask_leaves_positions_out_of_mean_and_gradient(self):
        student, teacher = self.logits(2, 5, 3, 4)
        student.requires_grad_()
        mask = torch.zeros(2, 3, 4, dtype=torch.bool)
        mask[0, 1, 2] = mask[1, 0, 0] = mask[1, 2, 3] = True
        each = [
            distillation_loss(*(x[i].movedim(0, -1)[mask[i]] for x in (student, teacher))) for i in range(len(mask))
        ]
        loss = distillation_loss(student, teacher, mask=mask)
        torch.testing.assert_close(loss, torch.stack(each).mean())
        loss.backward()
        assert torch.equal(student.grad.abs().sum(1) > 0, mask)

    @pytest.mark.parametrize("valid", ["some in each", "none in some", "all"])
    def test_one_batch_has_the_mean_loss_of_its_parts(self, valid):
        """Law 5: a batch of 8 trains like two accumulated batches of 4."""
        student, teacher = self.logits(8, 5, 3, 4)
        mask = (
            torch.rand(8, 3, 4, generator=torch.Generator().manual_seed(4)) < torch.linspace(0.2, 1, 8)[:, None, None]
        )
        mask[:, 0, 0] = True
        if valid == "none in some":
            mask[[1, 2, 6]] = False
        mask = None if valid == "all" else mask
        whole = distillation_loss(student, teacher, mask=mask)
        halves = [
            distillation_loss(student[part], teacher[part], mask=None if mask is None else mask[part])
            for part in (slice(4), slice(4, 8))
        ]
        torch.testing.assert_close(whole, torch.stack(halves).mean())
        each = distillation_loss(student, teacher, reduction="none", mask=mask)
        torch.testing.assert_close(whole, each.mean())

    def test_no_valid_position_gives_zero(self):
        student, teacher = self.logits(2, 5, 3, 4)
        mask = torch.zeros(2, 3, 4, dtype=torch.bool)
        for reduction in ("mean", "none"):
            assert (distillation_loss(student, teacher, reduction=reduction, mask=mask) == 0).all()


class TestSeveralTeachers:
    def test_the_distribution_is_the_mean_of_theirs(self):
        generator = torch.Generator().manual_seed(3)
        each = [4 * torch.randn(3, 5, generator=generator) for _ in range(3)]
        mean = torch.stack([(x / 4).softmax(1) for x in each]).mean(0)
        torch.testing.assert_close((mean_teacher_logits(each, 4.0) / 4).softmax(1), mean)

    def test_one_teacher_passes_as_it_is(self):
        logits = torch.randn(2, 3)
        assert mean_teacher_logits([logits], 4.0) is logits

    def test_another_shape_is_refused(self):
        with pytest.raises(InputError, match="must give logits of one shape"):
            mean_teacher_logits([torch.zeros(2, 3), torch.zeros(2, 4)], 4.0)


class TestBoxLoss:
    def test_boxes_of_queries_without_an_object_do_not_count(self):
        logits = torch.tensor([[[9.0, -9.0], [-99.0, 99.0]]])  # the second query sees nothing
        ours, theirs = torch.zeros(1, 2, 4), torch.tensor([[[0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 1.0, 1.0]]])
        for reduction in ("mean", "none"):
            assert box_loss(ours, theirs, logits, reduction).item() == pytest.approx(1.0)
        assert box_loss(theirs, theirs, logits) == 0

    def test_one_batch_has_the_mean_loss_of_its_parts(self):
        generator = torch.Generator().manual_seed(3)
        ours, theirs = (torch.rand(8, 5, 4, generator=generator) for _ in range(2))
        logits = 4 * torch.randn(8, 5, 3, generator=generator)
        logits[::2, :, -1] += 5  # images with few objects, between others
        whole = box_loss(ours, theirs, logits)
        halves = [box_loss(ours[part], theirs[part], logits[part]) for part in (slice(4), slice(4, 8))]
        torch.testing.assert_close(whole, torch.stack(halves).mean())
        torch.testing.assert_close(whole, box_loss(ours, theirs, logits, "none").mean())
