"""Losses on features, of the methods that SQAKD is compared with, and of SQuaT: pure functions of tensors.

Feature maps are `(B, C, H, W)`, student's and teacher's of one shape (the two share an architecture, so that no
learned adaptor stands between them); pooled features are `(B, C)`. Computed in float32 or wider; no gradient flows to
the teacher's side. Each returns a scalar.
"""

import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional as F


def hint_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of one feature map, as in [FitNets](https://arxiv.org/abs/1412.6550).

    Examples:
        >>> hint_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 1.0]]]])).item()
        5.0
    """
    student, teacher = _wide(student, teacher)
    return (student - teacher).square().mean()


def attention_transfer_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared difference of normalised attention maps, summed over stages.

    A map is the mean of the squared channels, `(B, H W)`, divided by its norm:
    [attention transfer](https://arxiv.org/abs/1612.03928).
    """

    def attention(features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.square().mean(1).flatten(1))

    pairs = [_wide(*pair) for pair in zip(student, teacher, strict=True)]
    return sum((attention(one) - attention(other)).square().mean() for one, other in pairs)


def similarity_preserving_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of the images' similarities `(B, B)`, each row divided by its norm.

    Of one feature map: [similarity-preserving distillation](https://arxiv.org/abs/1907.09682).
    """

    def similarity(features: torch.Tensor) -> torch.Tensor:
        rows = features.flatten(1)
        return F.normalize(rows @ rows.T)

    student, teacher = _wide(student, teacher)
    return (similarity(student) - similarity(teacher)).square().mean()


def neuron_selectivity_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the squared maximum mean discrepancy of the channels' normalised maps, summed over stages.

    With the kernel `(x · y)²`, averaged over pairs of channels and over images:
    [neuron selectivity transfer](https://arxiv.org/abs/1707.01219).
    """

    def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one @ other.transpose(1, 2)).square().mean()

    total = 0
    for one, other in zip(student, teacher, strict=True):
        one, other = (F.normalize(features.flatten(2), dim=2) for features in _wide(one, other))
        total = total + kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)
    return total


def relational_loss(
    student: torch.Tensor, teacher: torch.Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> torch.Tensor:
    """Return the Huber distance of the images' mutual distances and angles, of pooled features.

    Distances are divided by their mean over pairs of different images; angles are the cosines at each image between
    any two others: [relational distillation](https://arxiv.org/abs/1904.05068), with its weights.
    """
    student, teacher = _wide(student, teacher)
    distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
    angle = F.smooth_l1_loss(_angles(student), _angles(teacher))
    return distance_weight * distance + angle_weight * angle


def _relative_distances(features: torch.Tensor) -> torch.Tensor:
    squares = features.square().sum(1)
    distances = (squares[:, None] + squares - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(len(features), device=features.device, dtype=features.dtype))
    others = len(features) * (len(features) - 1)
    return distances / (distances.sum() / max(others, 1)).clamp(min=1e-12)


def _angles(features: torch.Tensor) -> torch.Tensor:
    directions = F.normalize(features[None] - features[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def correlation_loss(student: torch.Tensor, teacher: torch.Tensor, gamma: float = 0.4, order: int = 2) -> torch.Tensor:
    """Return the mean squared difference of the images' correlations, of pooled features.

    Correlation is the Gaussian kernel of normalised features by its Taylor series,
    `sum_p exp(-2 gamma) (2 gamma)^p / p! (x · y)^p`, `p = 0 … order`:
    [correlation congruence](https://arxiv.org/abs/1904.01802).
    """

    def correlation(features: torch.Tensor) -> torch.Tensor:
        products = F.normalize(features) @ F.normalize(features).T
        total = term = torch.ones_like(products)
        for power in range(1, order + 1):
            term = term * (2 * gamma / power) * products
            total = total + term
        return total * torch.exp(torch.tensor(-2 * gamma, dtype=features.dtype))

    student, teacher = _wide(student, teacher)
    return (correlation(student) - correlation(teacher)).square().mean()


def probabilistic_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the divergence of the images' similarities taken as probabilities, of pooled features.

    Similarity is `(1 + cosine) / 2`, each row divided by its sum; the divergence is the mean over pairs:
    [probabilistic knowledge transfer](https://arxiv.org/abs/1803.10837).
    """

    def probabilities(features: torch.Tensor) -> torch.Tensor:
        similarity = (F.normalize(features) @ F.normalize(features).T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    student, teacher = (probabilities(features) for features in _wide(student, teacher))
    tiny = 1e-7
    return (teacher * ((teacher + tiny) / (student + tiny)).log()).mean()


def flow_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared difference of the flow between consecutive stages, summed over the pairs of stages.

    The flow is the product of two stages' channels averaged over positions, `(B, C1, C2)`, the larger map pooled to
    the smaller one: [flow of solution procedure](https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html).
    """

    def flow(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        one = F.adaptive_avg_pool2d(one, other.shape[2:])
        return one.flatten(2) @ other.flatten(2).transpose(1, 2) / other[0, 0].numel()

    wide = [_wide(*pair) for pair in zip(student, teacher, strict=True)]
    return sum((flow(a, b) - flow(c, d)).square().mean() for (a, c), (b, d) in itertools.pairwise(wide))


def lattice_loss(
    student: torch.Tensor, teacher: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared difference of quantized activations, in units of their range.

    Both come from one quantizer, the student's own: what the student can't represent is not asked of it. The feature
    term of [SQuaT](https://arxiv.org/abs/2608.10709). No gradient flows through the range's width here, or widening
    it would lower the loss.

    Args:
        student, teacher (`torch.Tensor`): Values on the quantizer's grid, any shape.
        lower, upper (`torch.Tensor`): The grid's ends, `(1,)`.
    """
    student, teacher = _wide(student, teacher)
    return ((student - teacher) / (upper - lower).detach()).square().mean()


def _wide(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.to(wide), teacher.detach().to(wide)
