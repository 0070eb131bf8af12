"""Sample-wise and feature-wise contrastive losses between the regions of student and teacher.

Shapes: N batch (N' candidates, P N when gathered from P processes), K scales, R_k regions of scale
k, R all regions, D embedding. All maths runs in float32, or float64 when the student's regions are,
whatever autocast says.

Source: arXiv 2502.05835 names the two losses and that a single batch suffices; the equations are
this project's reconstruction, built on InfoNCE (van den Oord et al., arXiv 1807.03748).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mskd_plugin.errors import SettingError, check_above_zero, is_number
from mskd_plugin.functional.categorization import check_labels
from mskd_plugin.functional.constants import kept
from mskd_plugin.functional.distributed import gather_batch, rank

#: Where negatives may come from: this process's batch, or the batches of all processes.
NEGATIVES = ("process", "all")

#: Similarities held at once: 128 MiB in float32. More of them stream in blocks.
MAX_SIMILARITIES = 2**25
#: Similarities of a block, about. On a CPU small blocks are the faster ones.
BLOCK_SIMILARITIES = 2**22


class ContrastiveTerms(NamedTuple):
    """The two terms of one stage, each a scalar, averaged over scales by ``scale_weights``."""

    sample_wise: Tensor
    feature_wise: Tensor


def check_scale_weights(scale_weights: Sequence[float]) -> None:
    """Check that ``scale_weights`` can weigh a mean.

    Raises:
        SettingError: If they are no finite numbers of at least 0 with a sum above 0.
    """
    if (
        not isinstance(scale_weights, Sequence)
        or not all(is_number(weight) and weight >= 0 for weight in scale_weights)
        or not sum(scale_weights) > 0
    ):
        raise SettingError("scale_weights", "numbers of at least 0, not all 0", repr(scale_weights))


def check_regions(student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor) -> None:
    """Check that student and teacher regions can be compared.

    Raises:
        SettingError: If they are not tuples of (N, R_k, D) tensors of equal shapes at every scale,
            or N or D differ between scales.
    """
    for name, regions in (("student_regions", student), ("teacher_regions", teacher)):
        expected = "a tuple with one tensor (N, R_k, D) per scale, as the connector gives"
        # A bare map would pass for a tuple of its images.
        if isinstance(regions, Tensor):
            raise SettingError(name, expected, f"a tensor of shape {tuple(regions.shape)}")
        if not isinstance(regions, (tuple, list)) or not regions:
            raise SettingError(name, expected, repr(regions))
        if not all(isinstance(scale, Tensor) for scale in regions):
            kinds = ", ".join(type(scale).__name__ for scale in regions)
            raise SettingError(name, expected, f"one of {kinds}")
    if len(student) != len(teacher):
        raise SettingError(
            "student_regions",
            f"as many scales as the teacher's {len(teacher)}",
            f"{len(student)}",
            "Give both connectors the same `scales`.",
        )
    for s, t in zip(student, teacher):
        if s.dim() != 3 or s.shape != t.shape:
            raise SettingError(
                "student_regions",
                f"the teacher's shape (N, R_k, D) = {tuple(t.shape)}",
                f"{tuple(s.shape)}",
                "Regions differ when `scales` or `overlap` do, or when the maps' sizes do and "
                "`overlap` is above 0; widths differ when the student's connector has no projector "
                "to the teacher's channels.",
            )
    size, _, width = student[0].shape
    for s in student:
        if s.shape[0] != size or s.shape[1] == 0 or s.shape[2] != width:
            raise SettingError(
                "student_regions",
                "of one N and one D at all scales, each with a region",
                f"shapes {[tuple(scale.shape) for scale in student]}",
            )


def _embed(
    regions: Sequence[Tensor], center: bool, gather: bool, eps: float, length: float = 1.0
) -> Tensor:
    """Bring the regions of all scales, centred if asked, to ``length`` and join them: (N', R, D).

    With ``gather`` the batch mean and the result are those of all processes.
    """
    joined = torch.cat(list(regions), dim=1)
    if joined.dtype in (torch.float16, torch.bfloat16):
        joined = joined.float()
    if gather:
        joined = gather_batch(joined)
    if center:
        counts = [scale.shape[1] for scale in regions]
        joined = torch.cat(
            [scale - scale.mean((0, 1), keepdim=True) for scale in joined.split(counts, dim=1)],
            dim=1,
        )
    norm = joined.norm(dim=-1, keepdim=True).clamp_min(eps)
    return joined / (norm if length == 1 else norm / length)


def _log_probability(
    query: Tensor, keys: Tensor, offset: int = 0, dropped: Tensor | None = None
) -> Tensor:
    """Return the log-probability of each query's positive among the keys of its group: (B, M).

    Queries are (B, M, D), keys (B, M', D), their products the logits. The positive of query m is
    key m + ``offset``; ``dropped`` (M, M') marks keys that are no negatives. InfoNCE is minus the
    result. Beyond ``MAX_SIMILARITIES`` the rows go by in blocks, whose similarities are made
    anew in the backward pass, so that those of one block alone are held.
    """
    groups, size = query.shape[:2]
    if groups * size * keys.shape[1] <= MAX_SIMILARITIES:
        return _log_probability_block(query, keys, offset, dropped)
    block = min(BLOCK_SIMILARITIES, MAX_SIMILARITIES)
    rows = min(size, max(1, block // keys.shape[1]))
    at_once = max(1, block // (rows * keys.shape[1]))
    found = [
        torch.cat(
            [
                checkpoint(
                    _log_probability_block,
                    some,
                    candidates,
                    offset + start,
                    None if dropped is None else dropped.narrow(0, start, some.shape[1]),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for start, some in zip(range(0, size, rows), group.split(rows, dim=1))
            ],
            dim=1,
        )
        for group, candidates in zip(query.split(at_once), keys.split(at_once))
    ]
    return torch.cat(found)


def _log_probability_block(
    query: Tensor, keys: Tensor, offset: int, dropped: Tensor | None
) -> Tensor:
    logits = torch.bmm(query, keys.transpose(1, 2))  # (B, M, M')
    if dropped is not None:
        logits = logits.masked_fill(dropped, float("-inf"))
    return F.log_softmax(logits, dim=-1).diagonal(offset, 1, 2)


def _sample_wise(query: Tensor, keys: Tensor, offset: int, same_class: Tensor | None) -> Tensor:
    """Compare each region with the same region of the other images: (N, R) log-probabilities.

    The positive of query n is key n + ``offset``.
    """
    found = _log_probability(query.transpose(0, 1), keys.transpose(0, 1), offset, same_class)
    return found.t()


def multi_scale_contrastive_terms(
    student_regions: Sequence[Tensor],
    teacher_regions: Sequence[Tensor],
    *,
    temperature: float = 0.1,
    scale_weights: Sequence[float] | None = None,
    symmetric: bool = False,
    center: bool = False,
    negatives: str = "process",
    region_weights: Sequence[Tensor] | None = None,
    excluded_labels: Tensor | None = None,
    feature_wise: bool = True,
    eps: float = 1e-12,
) -> ContrastiveTerms:
    r"""Compute the sample-wise and the feature-wise term of one stage.

    With :math:`q = s / |s|` and :math:`p = t / |t|`,

    .. math::
        l^{sam}_{nkr} = -\log \frac{\exp(\langle q_{nkr}, p_{nkr} \rangle / \tau)}
                             {\sum_m \exp(\langle q_{nkr}, p_{mkr} \rangle / \tau)}, \quad
        l^{fea}_{nkr} = -\log \frac{\exp(\langle q_{nkr}, p_{nkr} \rangle / \tau)}
                             {\sum_u \exp(\langle q_{nkr}, p_{nku} \rangle / \tau)}

    and each term is :math:`\sum_k \lambda_k \operatorname{mean}_{nr} w_{nkr} l_{nkr} / \sum_k
    \lambda_k`. A scale of one region has no feature-wise loss and a batch of one image no
    sample-wise loss: both count as zero and stay in the graph. The teacher gets no gradient.

    Args:
        student_regions: (N, R_k, D) per scale.
        teacher_regions: (N, R_k, D) per scale.
        temperature: :math:`\tau`, above 0.
        scale_weights: :math:`\lambda_k`, one per scale. Default: all 1.
        symmetric: Average each loss with its teacher-anchored twin, where a teacher region seeks
            its student region.
        center: First take the mean over batch and regions of a scale off each side. Maps behind a
            ReLU are all positive, so their raw cosines crowd together.
        negatives: ``"process"``: images of this process. ``"all"``: of all processes; value and
            gradient then equal those of one process with the whole batch.
        region_weights: :math:`w`, (N, R_k) per scale. Default: all 1.
        excluded_labels: (N,) class indices; images of the query's class are left out of its
            negatives.
        feature_wise: Whether to compute the feature-wise term; it is zero otherwise.
        eps: Smallest norm divided by.

    Returns:
        The two scalars.

    Raises:
        SettingError: If shapes or settings do not fit together.

    Example:
        >>> same = (torch.ones(4, 1, 8),)
        >>> terms = multi_scale_contrastive_terms(same, same)
        >>> bool(torch.isclose(terms.sample_wise, torch.tensor(4.0).log()))
        True
    """
    check_regions(student_regions, teacher_regions)
    check_above_zero("temperature", temperature)
    if negatives not in NEGATIVES:
        raise SettingError("negatives", f"one of {NEGATIVES}", repr(negatives))
    counts = [scale.shape[1] for scale in student_regions]
    size = student_regions[0].shape[0]
    lambdas = [1.0] * len(counts)
    if scale_weights is not None:
        check_scale_weights(scale_weights)
        lambdas = list(scale_weights)
    if len(lambdas) != len(counts):
        raise SettingError("scale_weights", f"{len(counts)} weights, one per scale", f"{lambdas}")
    if region_weights is not None:
        shapes = [tuple(w.shape) for w in region_weights]
        if shapes != [(size, count) for count in counts]:
            raise SettingError(
                "region_weights",
                f"of the regions' shapes (N, R_k) = {[(size, count) for count in counts]}",
                f"shapes {shapes}",
            )
    if excluded_labels is not None:
        check_labels(excluded_labels, size)

    gather = negatives == "all"
    offset = rank() * size if gather else 0
    with torch.autocast(student_regions[0].device.type, enabled=False):
        keys = _embed([t.detach() for t in teacher_regions], center, gather, eps)
        # The student's rows are needed from every process only where they are candidates or make
        # the mean.
        queries_of_all = _embed(
            student_regions, center, gather and (center or symmetric), eps, 1 / temperature
        )
        keys = keys.to(queries_of_all.dtype)
        query = queries_of_all
        if queries_of_all.shape[0] != size:
            query = queries_of_all.narrow(0, offset, size)
        positive_key = keys.narrow(0, offset, size)

        same_class = None
        if excluded_labels is not None:
            candidates = gather_batch(excluded_labels) if gather else excluded_labels
            same_class = excluded_labels[:, None] == candidates[None, :]
            same_class.diagonal(offset).fill_(False)  # the positives stay

        sample = _sample_wise(query, keys, offset, same_class)
        if symmetric:
            mirrored = _sample_wise(positive_key, queries_of_all, offset, same_class)
            sample = (sample + mirrored) / 2

        term = _mean_loss(sample, counts, lambdas, region_weights)
        several = [k for k, count in enumerate(counts) if count > 1]
        if not feature_wise or not several:
            # Zero, yet a function of the student.
            return ContrastiveTerms(term, 0 * query.sum())
        found = []
        q_of, p_of = query.split(counts, dim=1), positive_key.split(counts, dim=1)
        for k in several:
            # Against the other regions of the same image and scale.
            feature = _log_probability(q_of[k], p_of[k])
            if symmetric:
                feature = (feature + _log_probability(p_of[k], q_of[k])) / 2
            found.append(feature)
        feature_term = _mean_loss(
            torch.cat(found, dim=1),
            [counts[k] for k in several],
            [lambdas[k] for k in several],
            None if region_weights is None else [region_weights[k] for k in several],
            total=sum(lambdas),
        )
    return ContrastiveTerms(term, feature_term)


def _mean_loss(
    found: Tensor,
    counts: Sequence[int],
    lambdas: Sequence[float],
    weights: Sequence[Tensor] | None,
    total: float | None = None,
) -> Tensor:
    """Take minus the mean of (N, R) log-probabilities over images and regions, weighted by scale
    and by region.
    """
    if weights is not None:
        found = found * torch.cat(list(weights), dim=1)
    total = sum(lambdas) if total is None else total
    shares = tuple(-scale / (total * count) for scale, count in zip(lambdas, counts))
    return (found @ _repeated(shares, tuple(counts), found.device, found.dtype)).mean()


@kept
def _repeated(
    values: tuple[float, ...], counts: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Give each value as often as its count says."""
    numbers = [value for value, count in zip(values, counts) for _ in range(count)]
    return torch.tensor(numbers, dtype=dtype, device=device)
