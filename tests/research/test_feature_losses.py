"""Feature losses against their papers' formulas, written out element by element in float64 numpy."""

import itertools
import math

import numpy as np
import pytest
import torch

from sqakd_hf.research import feature_losses as losses


B, C, H, W = 4, 3, 2, 5


def maps(seed, shape=(B, C, H, W), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(vector):
    return vector / np.linalg.norm(vector)


def hint(s, t):
    return sum((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)) / s.size


def attention(s, t):
    def attend(image):
        return unit(np.array([[np.mean([image[c, y, x] ** 2 for c in range(C)]) for x in range(W)] for y in range(H)]))

    return np.mean([(attend(s[b]) - attend(t[b])) ** 2 for b in range(B)])


def similarity(s, t):
    def similar(images):
        rows = [[np.sum(one * other) for other in images] for one in images]
        return np.array([unit(np.array(row)) for row in rows])

    return np.sum((similar(s) - similar(t)) ** 2) / B**2


def selectivity(s, t):
    def kernel(one, other):
        pairs = [(unit(a.ravel()) @ unit(b.ravel())) ** 2 for i in range(B) for a in one[i] for b in other[i]]
        return np.mean(pairs)

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def huber(x, y):
    return 0.5 * (x - y) ** 2 if abs(x - y) < 1 else abs(x - y) - 0.5


def relational(s, t):
    def distances(f):
        d = np.array([[np.linalg.norm(a - b) for b in f] for a in f])
        return d / np.mean([d[i, j] for i in range(B) for j in range(B) if i != j])

    def angle(f, i, j, k):
        return 0.0 if i in (j, k) else unit(f[j] - f[i]) @ unit(f[k] - f[i])

    ds, dt = distances(s), distances(t)
    distance = np.mean([huber(ds[i, j], dt[i, j]) for i in range(B) for j in range(B)])
    triples = itertools.product(range(B), repeat=3)
    return 25 * distance + 50 * np.mean([huber(angle(s, *ijk), angle(t, *ijk)) for ijk in triples])


def correlation(s, t, gamma=0.4):
    def kernel(a, b):
        product = unit(a) @ unit(b)
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * product**p for p in range(3))

    return np.mean([(kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i in range(B) for j in range(B)])


def probabilistic(s, t):
    def probability(f, i, j):
        similar = [(unit(f[i]) @ unit(other) + 1) / 2 for other in f]
        return similar[j] / sum(similar)

    pairs = [(probability(t, i, j), probability(s, i, j)) for i in range(B) for j in range(B)]
    return np.mean([p * math.log((p + 1e-7) / (q + 1e-7)) for p, q in pairs])


def flow(s, t):
    """Between the map and its left half, pooled by hand: the first is averaged over pairs of columns."""

    def matrix(large, small):
        pooled = (large[..., 0::2] + large[..., 1::2]) / 2
        out = np.zeros((B, C, C))
        for b, i, j in itertools.product(range(B), range(C), range(C)):
            out[b, i, j] = np.mean(pooled[b, i] * small[b, j])
        return out

    return np.mean((matrix(*s) - matrix(*t)) ** 2)


MAPS = {
    losses.hint_loss: hint,
    losses.similarity_preserving_loss: similarity,
}
STAGES = {
    losses.attention_transfer_loss: attention,
    losses.neuron_selectivity_loss: selectivity,
}
POOLED = {
    losses.relational_loss: relational,
    losses.correlation_loss: correlation,
    losses.probabilistic_loss: probabilistic,
}


@pytest.mark.parametrize("loss", MAPS)
def test_of_one_map_is_the_formula(loss):
    student, teacher = maps(0), maps(1)
    assert loss(student, teacher).item() == pytest.approx(MAPS[loss](student.numpy(), teacher.numpy()), rel=1e-10)


@pytest.mark.parametrize("loss", STAGES)
def test_of_stages_is_the_sum_of_the_formula(loss):
    stages = [(maps(seed), maps(seed + 1)) for seed in (0, 2)]
    expected = sum(STAGES[loss](student.numpy(), teacher.numpy()) for student, teacher in stages)
    assert loss(*zip(*stages, strict=True)).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", POOLED)
def test_of_pooled_features_is_the_formula(loss):
    student, teacher = maps(0, (B, 6)), maps(1, (B, 6))
    # The expanded square of the distances costs digits.
    assert loss(student, teacher).item() == pytest.approx(POOLED[loss](student.numpy(), teacher.numpy()), rel=1e-7)


def test_flow_is_the_formula():
    student, teacher = ([maps(seed, (B, C, H, 4)), maps(seed + 1, (B, C, H, 2))] for seed in (0, 2))
    expected = flow([each.numpy() for each in student], [each.numpy() for each in teacher])
    assert losses.flow_loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_lattice_is_the_difference_of_codes_in_units_of_the_range():
    lower, upper = torch.tensor([-1.0]), torch.tensor([2.0])  # four values, 1 apart
    student, teacher = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, -1.0])
    assert losses.lattice_loss(student, teacher, lower, upper).item() == pytest.approx((1 / 9 + 0 + 1) / 3)


def test_lattice_sends_no_gradient_through_the_width_of_the_range():
    lower, upper = (torch.tensor([value], requires_grad=True) for value in (-1.0, 2.0))
    student = torch.tensor([0.5], requires_grad=True)
    losses.lattice_loss(student, torch.tensor([1.0]), lower, upper).backward()
    assert student.grad is not None and lower.grad is None and upper.grad is None


EVERY = [
    *((loss, lambda seed: maps(seed)) for loss in MAPS),
    *((loss, lambda seed: [maps(seed), maps(seed + 9)]) for loss in [*STAGES, losses.flow_loss]),
    *((loss, lambda seed: maps(seed, (B, 6))) for loss in POOLED),
]


@pytest.mark.parametrize(("loss", "make"), EVERY, ids=lambda value: getattr(value, "__name__", ""))
class TestEvery:
    def test_is_zero_for_the_teachers_own_features_with_a_finite_gradient(self, loss, make):
        student = make(0)
        leaves = student if isinstance(student, list) else [student]
        for leaf in leaves:
            leaf.requires_grad_()
        value = loss(student, make(0))
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)

    def test_leads_towards_the_teacher_and_sends_it_no_gradient(self, loss, make):
        student, teacher = make(0), make(1)
        pairs = list(zip(student, teacher, strict=True)) if isinstance(student, list) else [(student, teacher)]
        for pair in pairs:
            for tensor in pair:
                tensor.requires_grad_()
        before = loss(student, teacher)
        before.backward()
        with torch.no_grad():
            for leaf, _ in pairs:
                leaf -= 1e-3 * leaf.grad / leaf.grad.norm()
        assert loss(student, teacher) < before
        assert all(leaf.grad is None for _, leaf in pairs)

    def test_of_half_precision_features_is_computed_in_float32(self, loss, make):
        def cast(value):
            return [v.bfloat16() for v in value] if isinstance(value, list) else value.bfloat16()

        value = loss(cast(make(0)), cast(make(1)))
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(make(0), make(1)).item(), rel=0.05)
