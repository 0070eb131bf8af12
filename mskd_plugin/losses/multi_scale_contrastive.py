"""The multi-scale contrastive loss as an MMRazor distillation loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmrazor.registry import MODELS
from torch import Tensor, nn

from mskd_plugin.errors import SettingError, check_above_zero, check_at_least_zero, check_flag
from mskd_plugin.functional import consistent_regions, multi_scale_contrastive_terms
from mskd_plugin.functional.contrastive import NEGATIVES, check_scale_weights

KEPT_REGIONS = ("all", "consistent", "complementary")


@MODELS.register_module()
class MultiScaleContrastiveLoss(nn.Module):
    r"""Pull each student region to the teacher's, away from other images and other regions.

    For one stage,

    .. math::
        L = \frac{\alpha}{\sum_k \lambda_k} \sum_k \lambda_k
            [\operatorname{mean}_{nr} w\, l^{sam} + \beta \operatorname{mean}_{nr} w\, l^{fea}]

    with the terms of :func:`mskd_plugin.functional.multi_scale_contrastive_terms`. Several stages
    are several losses of this type, each with its own :math:`\alpha`.

    Args:
        loss_weight: :math:`\alpha`, at least 0.
        feature_weight: :math:`\beta`, at least 0; 0 leaves the feature-wise term out.
        temperature: :math:`\tau`, above 0.
        scale_weights: :math:`\lambda_k`, one per scale of the connectors, at least 0. Default: all
            1.
        symmetric: Average each term with its teacher-anchored twin.
        center: First take the mean over batch and regions of a scale off each side.
        negatives: ``"process"``: the images of this process, which is one GPU's batch. ``"all"``:
            of all processes.
        complementary_weight: :math:`w` of complementary regions, at least 0; consistent regions
            weigh 1.
        keep: ``"all"`` regions, or only the ``"consistent"`` or the ``"complementary"`` ones; the
            others get :math:`w = 0`, and the mean is still taken over all.
        exclude_same_class: Leave images of the query's class out of the sample-wise negatives.

    Shapes:
        Regions are tuples of (N, R_k, D) as :class:`MultiScaleDecouplingConnector` gives them,
        labels (N,), the teacher's classifier (M, D) and (M,). The result is a scalar, in float32 or
        wider.

    Attributes:
        terms: The last call's unweighted terms, ``sample_wise`` and ``feature_wise``, detached, for
            logs.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if the regions of both
            sides do not fit together, or what a setting needs (labels, classifier) was not mapped.

    Source: arXiv 2502.05835, reconstructed; see :mod:`mskd_plugin.functional.contrastive`.

    Example:
        >>> loss = MultiScaleContrastiveLoss(temperature=0.1)
        >>> student = (torch.eye(4).unsqueeze(1),)  # N = 4 orthogonal vectors, one region
        >>> expected = torch.log1p(3 * torch.exp(torch.tensor(-10.0)))
        >>> bool(torch.isclose(loss(student, student), expected, rtol=1e-2))
        True
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        feature_weight: float = 1.0,
        temperature: float = 0.1,
        scale_weights: Sequence[float] | None = None,
        symmetric: bool = False,
        center: bool = False,
        negatives: str = "process",
        complementary_weight: float = 1.0,
        keep: str = "all",
        exclude_same_class: bool = False,
    ) -> None:
        super().__init__()
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)
        self.feature_weight = check_at_least_zero("feature_weight", feature_weight)
        self.complementary_weight = check_at_least_zero(
            "complementary_weight", complementary_weight
        )
        self.temperature = check_above_zero("temperature", temperature)
        self.symmetric = check_flag("symmetric", symmetric)
        self.center = check_flag("center", center)
        self.exclude_same_class = check_flag("exclude_same_class", exclude_same_class)
        if scale_weights is not None:
            check_scale_weights(scale_weights)
        if negatives not in NEGATIVES:
            raise SettingError("negatives", f"one of {NEGATIVES}", repr(negatives))
        if keep not in KEPT_REGIONS:
            raise SettingError("keep", f"one of {KEPT_REGIONS}", repr(keep))
        if keep == "consistent" and complementary_weight != 1:
            raise SettingError(
                "complementary_weight",
                "1 when `keep` is 'consistent', which leaves complementary regions out",
                repr(complementary_weight),
            )
        self.scale_weights = scale_weights
        self.negatives = negatives
        self.keep = keep
        self.terms: dict[str, Tensor] = {}

    @property
    def joins_processes(self) -> bool:
        """Whether the loss joins the batches of all processes, which have to be of one size."""
        return self.negatives == "all"

    @property
    def categorizes(self) -> bool:
        """Whether regions are treated by category, which needs labels and the teacher's
        classifier.
        """
        return self.keep != "all" or self.complementary_weight != 1

    def forward(
        self,
        student_regions: Sequence[Tensor],
        teacher_regions: Sequence[Tensor],
        labels: Tensor | None = None,
        classifier_weight: Tensor | None = None,
        classifier_bias: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted loss of one stage."""
        needs_labels = self.categorizes or self.exclude_same_class
        if needs_labels and labels is None:
            raise SettingError(
                "labels",
                "mapped in `loss_forward_mappings`, since regions or negatives are chosen by class",
                None,
            )
        terms = multi_scale_contrastive_terms(
            student_regions,
            teacher_regions,
            temperature=self.temperature,
            scale_weights=self.scale_weights,
            symmetric=self.symmetric,
            center=self.center,
            negatives=self.negatives,
            region_weights=self._region_weights(
                teacher_regions, labels, classifier_weight, classifier_bias
            ),
            excluded_labels=labels if self.exclude_same_class else None,
            feature_wise=self.feature_weight > 0,
        )
        self.terms = {name: term.detach() for name, term in terms._asdict().items()}
        return self.loss_weight * (terms.sample_wise + self.feature_weight * terms.feature_wise)

    def _region_weights(
        self,
        teacher_regions: Sequence[Tensor],
        labels: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...] | None:
        if not self.categorizes:
            return None
        if weight is None or labels is None:
            raise SettingError(
                "classifier_weight",
                "mapped in `loss_forward_mappings` from a Parameter recorder of the teacher, "
                "since regions are categorized",
                None,
            )
        of_consistent = 0.0 if self.keep == "complementary" else 1.0
        of_complementary = 0.0 if self.keep == "consistent" else self.complementary_weight
        consistent = consistent_regions(teacher_regions, labels, weight, bias)
        return tuple(torch.where(scale, of_consistent, of_complementary) for scale in consistent)
