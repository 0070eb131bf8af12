"""Sample-wise and feature-wise contrastive losses between the regions of student and teacher.

Shapes: N batch (N' candidates, P N when gathered from P processes), K scales, R_k regions of scale
k, R all regions, D embedding. All maths runs in float32, or float64 when given, whatever autocast
says.

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

from mskd_plugin.errors import SettingError
from mskd_plugin.functional.categorization import check_labels
from mskd_plugin.functional.distributed import gather_batch, rank

#: Where negatives may come from: this process's batch, or the batches of all processes.
NEGATIVES = ("process", "all")

#: Similarities held at once, about: 128 MiB in float32. What exceeds it is streamed in blocks.
MAX_SIMILARITIES = 2**25


class ContrastiveTerms(NamedTuple):
    """The two terms of one stage, each a scalar, averaged over scales by ``scale_weights``."""

    sample_wise: Tensor
    feature_wise: Tensor


def check_temperature(temperature: float) -> None:
    """Check that ``temperature`` divides.

    Raises:
        SettingError: If it is no number above 0.
    """
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise SettingError("temperature", "a number above 0", repr(temperature))


def check_scale_weights(scale_weights: Sequence[float]) -> None:
    """Check that ``scale_weights`` can weigh a mean.

    Raises:
        SettingError: If they are no numbers of at least 0 with a sum above 0.
    """
    if (
        not isinstance(scale_weights, Sequence)
        or not all(isinstance(w, (int, float)) and w >= 0 for w in scale_weights)
        or not sum(scale_weights) > 0
    ):
        raise SettingError("scale_weights", "numbers of at least 0, not all 0", repr(scale_weights))


def check_regions(student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor) -> None:
    """Check that student and teacher regions can be compared.

    Raises:
        SettingError: If they are not tuples of (N, R_k, D) tensors of equal shapes at every scale.
    """
    for name, regions in (("student_regions", student), ("teacher_regions", teacher)):
        # A bare map would pass for a tuple of its images.
        if isinstance(regions, Tensor) or len(regions) == 0:
            raise SettingError(
                name,
                "a tuple with one tensor (N, R_k, D) per scale, as the connector gives",
                f"a tensor of shape {tuple(regions.shape)}"
                if isinstance(regions, Tensor)
                else repr(regions),
            )
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


def _embed(regions: Sequence[Tensor], center: bool, gather: bool, eps: float) -> Tensor:
    """Normalise the regions of all scales, centred if asked, and join them: (N', R, D).

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
    return F.normalize(joined, dim=-1, eps=eps)


def _info_nce(
    query: Tensor, keys: Tensor, temperature: float, offset: int = 0, dropped: Tensor | None = None
) -> Tensor:
    """InfoNCE of each row of (B, M, D) against the rows of (B, M', D) of its group: (B, M) losses.

    The positive of query m is key m + ``offset``; ``dropped`` (M, M') marks keys that are no
    negatives. Beyond ``MAX_SIMILARITIES`` the rows go by in blocks, whose similarities are made
    anew in the backward pass, so that those of one block alone are held.
    """
    groups, size = query.shape[:2]
    positive = torch.arange(size, device=query.device) + offset
    if dropped is not None:
        dropped = dropped.scatter(1, positive[:, None], False)
    if groups * size * keys.shape[1] <= MAX_SIMILARITIES:
        return _info_nce_block(query, keys, temperature, positive, dropped)
    rows = min(size, max(1, MAX_SIMILARITIES // keys.shape[1]))
    at_once = max(1, MAX_SIMILARITIES // (rows * keys.shape[1]))
    losses = [
        torch.cat(
            [
                checkpoint(
                    _info_nce_block,
                    some,
                    candidates,
                    temperature,
                    positive_of_some,
                    None if dropped is None else dropped.narrow(0, start, some.shape[1]),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for start, some, positive_of_some in zip(
                    range(0, size, rows), group.split(rows, dim=1), positive.split(rows)
                )
            ],
            dim=1,
        )
        for group, candidates in zip(query.split(at_once), keys.split(at_once))
    ]
    return torch.cat(losses)


def _info_nce_block(
    query: Tensor, keys: Tensor, temperature: float, positive: Tensor, dropped: Tensor | None
) -> Tensor:
    logits = torch.bmm(query, keys.transpose(1, 2)).div_(temperature)  # (B, M, M')
    if dropped is not None:
        logits = logits.masked_fill(dropped, float("-inf"))
    losses = F.cross_entropy(logits.flatten(0, 1), positive.repeat(len(query)), reduction="none")
    return losses.view(query.shape[:2])


def _sample_wise(
    query: Tensor, keys: Tensor, temperature: float, offset: int, same_class: Tensor | None
) -> Tensor:
    """InfoNCE of each region against the same region of the other images: (N, R) losses.

    The positive of query n is key n + ``offset``.
    """
    losses = _info_nce(query.transpose(0, 1), keys.transpose(0, 1), temperature, offset, same_class)
    return losses.t()


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
    check_temperature(temperature)
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
        queries_of_all = _embed(student_regions, center, gather and (center or symmetric), eps)
        query = queries_of_all
        if queries_of_all.shape[0] != size:
            query = queries_of_all.narrow(0, offset, size)
        positive_key = keys.narrow(0, offset, size)

        same_class = None
        if excluded_labels is not None:
            candidates = gather_batch(excluded_labels) if gather else excluded_labels
            same_class = excluded_labels[:, None] == candidates[None, :]

        sample = _sample_wise(query, keys, temperature, offset, same_class)
        if symmetric:
            mirrored = _sample_wise(positive_key, queries_of_all, temperature, offset, same_class)
            sample = (sample + mirrored) / 2

        weights: Sequence[Tensor | None] = (
            [None] * len(counts) if region_weights is None else region_weights
        )
        total = sum(lambdas)
        # Zero, yet a function of the student: a term without negatives keeps the graph.
        sample_term = feature_term = 0 * query.sum()
        for scale_weight, q, p, l_sample, w in zip(
            lambdas,
            query.split(counts, dim=1),
            positive_key.split(counts, dim=1),
            sample.split(counts, dim=1),
            weights,
        ):
            share = scale_weight / total
            sample_term = sample_term + share * _weighted_mean(l_sample, w)
            if feature_wise and q.shape[1] > 1:
                # Against the other regions of the same image and scale.
                l_feature = _info_nce(q, p, temperature)
                if symmetric:
                    l_feature = (l_feature + _info_nce(p, q, temperature)) / 2
                feature_term = feature_term + share * _weighted_mean(l_feature, w)
    return ContrastiveTerms(sample_term, feature_term)


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).mean()
