"""CRD: contrastive representation distillation with a memory of all training images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from mmrazor.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mskd_plugin.errors import SettingError, check_above_zero, check_at_least_zero, check_count
from mskd_plugin.functional.categorization import check_labels
from mskd_plugin.functional.distributed import gather_batch, world_size
from mskd_plugin.functional.negatives import draw_negatives
from mskd_plugin.losses.feature_loss import at_least_float32

#: Added to probabilities, as published.
EPS = 1e-7


def noise_contrastive(log_odds: Tensor, images: int) -> Tensor:
    r"""Tell the positive of each row from negatives that are drawn uniformly.

    .. math::
        -\frac{1}{N} \sum_n \Big[\log \frac{P_{n0}}{P_{n0} + K / M + \epsilon}
            + \sum_{k=1}^{K} \log \frac{K / M}{P_{nk} + K / M + \epsilon}\Big]

    Args:
        log_odds: :math:`\log P`, (N, 1 + K), the positive first.
        images: M, the rows of the memory.
    """
    noise = (log_odds.shape[1] - 1) / images
    floor = torch.full((), math.log(noise + EPS), dtype=log_odds.dtype, device=log_odds.device)
    # log of each denominator: P + K / M + eps
    mixture = torch.logaddexp(log_odds, floor)
    positive = log_odds[:, 0] - mixture[:, 0]
    negatives = math.log(noise) - mixture[:, 1:]
    return -(positive.sum() + negatives.sum()) / len(log_odds)


class _Batch(NamedTuple):
    """Each image of the whole batch once: its row, its class, and both embeddings."""

    rows: Tensor
    labels: Tensor
    student: Tensor
    teacher: Tensor


@MODELS.register_module()
class MemoryCRDLoss(nn.Module):
    r"""Contrastive representation distillation (CRD) of pooled features.

    .. math::
        L = \alpha (l(e^s, m^t) + l(e^t, m^s)), \quad
        P_{nk} = \frac{1}{Z} \exp(\langle m_{i_{nk}}, e_n \rangle / \tau)

    with l of :func:`noise_contrastive`. :math:`e` are embeddings of unit length, learned linear
    maps of both networks' pooled features; :math:`m^s` and :math:`m^t` are memories of M rows, one
    a training image; :math:`i_{n0}` is the image's own row and :math:`i_{nk}` are K rows of images
    of other classes, drawn anew at each step. Each Z is M times the mean of the exponentials in the
    first batch, constant from then on. After each step in training mode the rows of the batch
    become :math:`normalise(\mu m + (1 - \mu) e)`. Positives and negatives are summed over, images
    averaged.

    Negatives are drawn on the device, as the published data loader draws them for the mode
    ``exact``: uniformly among the images of other classes, without replacement where there are K of
    them. The classes of the memory's rows are noted as the images come by, so in the first epoch
    an image whose class is not known yet can be drawn. Its rows are random numbers then, as those
    of any image not seen.

    All processes hold the same memories: they start from those of rank 0, and each updates the rows
    of the whole batch in the order of the ranks (of an image that occurs twice, the last counts).
    Given the same negatives, memories and Z of P processes with n images each equal those of one
    process with P n images, as do the mean over processes of the loss and of its gradient. Every
    process has to bring the same n, as mmengine's ``DefaultSampler`` does.

    Unlike MMRazor's ``CRDLoss``, this one heeds ``loss_weight``; Z holds no graph, so the loss can
    be copied; the memories keep in step across processes; the data loader carries one index an
    image, and no list of K. The scores against all M rows are one matrix product, of which the
    drawn ones are read: 2 N M numbers, where copies of the drawn rows take 2 N K D.

    Args:
        num_images: M, the number of training images; above every ``sample_idx``.
        loss_weight: :math:`\alpha`, at least 0. The CRD benchmark takes 0.8.
        embedding_channels: D. The CRD benchmark takes 128.
        num_negatives: K. The CRD benchmark takes 16384.
        temperature: :math:`\tau`, above 0. The CRD benchmark takes 0.07.
        momentum: :math:`\mu`, in [0, 1). The CRD benchmark takes 0.5.

    Shapes:
        Embeddings (N, D) and (N, D), not normalised; labels (N,); sample_idx (N,); a scalar comes
        out, in float32 or wider.

    Attributes:
        num_images: M; a training checks it.
        student_memory: (M, D), a buffer.
        teacher_memory: (M, D), a buffer.
        row_labels: (M,), a buffer; -1 for a class not known yet.
        log_normalizers: log Z of the student's and of the teacher's scores, (2,), a buffer;
            infinite before the first batch.
        terms: The last call's unweighted terms, ``student`` and ``teacher``, detached, for logs.

    Raises:
        SettingError: When built, if a setting is malformed; when called, if shapes do not fit, an
            index is outside the memory, labels are no classes (as under mixup), or all images seen
            are of one class.

    Source: Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", arXiv
    1910.10699, as computed by RepDistiller's ``crd/``.
    """

    #: The memories are updated by the batches of all processes, which have to be of one size.
    joins_processes = True

    def __init__(
        self,
        num_images: int,
        loss_weight: float = 1.0,
        embedding_channels: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_images = check_count("num_images", num_images)
        check_count("embedding_channels", embedding_channels)
        if check_at_least_zero("momentum", momentum) >= 1:
            raise SettingError("momentum", "a number in [0, 1)", repr(momentum))
        self.loss_weight = check_at_least_zero("loss_weight", loss_weight)
        self.temperature = check_above_zero("temperature", temperature)
        self.momentum = momentum
        self.num_negatives = check_count("num_negatives", num_negatives)
        bound = math.sqrt(3 / embedding_channels)  # rows of length 1 in the mean
        for side in ("student", "teacher"):
            memory = torch.empty(num_images, embedding_channels).uniform_(-bound, bound)
            self.register_buffer(f"{side}_memory", memory)
        self.register_buffer("row_labels", torch.full((num_images,), -1))
        self.register_buffer("log_normalizers", torch.full((2,), math.inf))
        self.student_memory: Tensor
        self.teacher_memory: Tensor
        self.row_labels: Tensor
        self.log_normalizers: Tensor
        self.terms: dict[str, Tensor] = {}
        self._in_step = False

    def forward(
        self,
        student_embedding: Tensor,
        teacher_embedding: Tensor,
        labels: Tensor,
        sample_idx: Tensor,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted loss, and in training mode update the memories.

        Args:
            student_embedding: (N, D).
            teacher_embedding: (N, D).
            labels: Classes, (N,).
            sample_idx: Each image's row of the memories, (N,).
            negatives: Rows of the negatives, (N, K), of any K. Default: drawn here.
        """
        self._check(student_embedding, teacher_embedding, labels, sample_idx)
        if not len(labels):
            return 0 * (student_embedding.sum() + teacher_embedding.sum())
        with torch.autocast(student_embedding.device.type, enabled=False):
            student, teacher = (
                functional.normalize(at_least_float32(embedding), dim=1)
                for embedding in (student_embedding, teacher_embedding)
            )
            sample_idx = sample_idx.to(student.device)
            if self.training:
                batch = self._whole_batch(student, teacher, labels, sample_idx)
                self.row_labels[batch.rows] = batch.labels
            if negatives is None:
                negatives = draw_negatives(self.row_labels, labels, self.num_negatives)
            rows = torch.cat([sample_idx[:, None], negatives.to(student.device)], dim=1)
            scores = torch.stack(
                [
                    self._scores(student, self.teacher_memory, rows),
                    self._scores(teacher, self.student_memory, rows),
                ]
            )
            log_odds = scores - self._log_normalizer(scores.detach())[:, None, None]
            terms = [noise_contrastive(side, len(self.row_labels)) for side in log_odds]
            if self.training:
                self._update(batch)
        self.terms = {"student": terms[0].detach(), "teacher": terms[1].detach()}
        return self.loss_weight * (terms[0] + terms[1])

    def _scores(self, embedding: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
        """Return the drawn rows' inner products with the embeddings over the temperature."""
        products = embedding @ memory.to(embedding.dtype).T  # (N, M)
        return products.gather(1, rows) / self.temperature  # (N, 1 + K)

    def _log_normalizer(self, scores: Tensor) -> Tensor:
        """Return log Z of both sides, (2,); the first batch of all processes sets it."""
        if bool(self.log_normalizers.isinf().any()):
            means = scores.flatten(1).logsumexp(1) - math.log(scores[0].numel())  # (2,)
            if self.training:
                means = gather_batch(means[None]).logsumexp(0) - math.log(world_size())
            first = means + math.log(len(self.row_labels))
            if not self.training:
                return first.to(scores.dtype)
            self.log_normalizers.copy_(first)  # CUDA graphs overwrite what they give
        return self.log_normalizers.to(scores.dtype)

    @torch.no_grad()
    def _whole_batch(
        self, student: Tensor, teacher: Tensor, labels: Tensor, sample_idx: Tensor
    ) -> _Batch:
        """Return what the processes bring together; of an image that occurs twice, the last."""
        if world_size() > 1 and not self._in_step:
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
            self._in_step = True
        embeddings = gather_batch(torch.cat([student, teacher], dim=1))
        rows, labels = gather_batch(torch.stack([sample_idx, labels], dim=1)).unbind(1)
        ordered, order = rows.sort(stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)
        last[:-1] = ordered[1:] != ordered[:-1]
        kept = order[last]
        return _Batch(rows[kept], labels[kept], *embeddings[kept].chunk(2, dim=1))

    @torch.compiler.disable
    def _update(self, batch: _Batch) -> None:
        """Move the batch's rows of the memories towards its embeddings.

        Not compiled: what CUDA graphs give is overwritten in the next step.
        """
        # Into new tensors: the backward pass still needs the old ones.
        self.student_memory = self._moved(self.student_memory, batch.rows, batch.student)
        self.teacher_memory = self._moved(self.teacher_memory, batch.rows, batch.teacher)

    def _moved(self, memory: Tensor, rows: Tensor, embedding: Tensor) -> Tensor:
        moved = self.momentum * memory[rows] + (1 - self.momentum) * embedding.to(memory.dtype)
        return memory.index_copy(0, rows, functional.normalize(moved, dim=1))

    def _check(self, student: Tensor, teacher: Tensor, labels: Tensor, sample_idx: Tensor) -> None:
        size, (images, channels) = len(student), self.student_memory.shape
        for name, embedding in (("student_embedding", student), ("teacher_embedding", teacher)):
            if embedding.shape != (size, channels):
                raise SettingError(
                    name,
                    f"of shape (N, `embedding_channels`) = {(size, channels)}",
                    f"shape {tuple(embedding.shape)}",
                )
        check_labels(labels, size)
        if sample_idx.shape != (size,) or sample_idx.dtype != torch.int64:
            raise SettingError(
                "sample_idx",
                f"{size} whole numbers, one an image",
                f"{sample_idx.dtype} of shape {tuple(sample_idx.shape)}",
            )
        if size and not (0 <= int(sample_idx.min()) and int(sample_idx.max()) < images):
            raise SettingError(
                "num_images",
                "the number of training images, above every image's index",
                f"{images} for indices {int(sample_idx.min())} to {int(sample_idx.max())}",
            )

    def extra_repr(self) -> str:
        """Show the settings."""
        images, channels = self.student_memory.shape
        return (
            f"num_images={images}, embedding_channels={channels}, "
            f"num_negatives={self.num_negatives}, temperature={self.temperature}"
        )
