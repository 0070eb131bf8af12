"""Two gloo processes against one: gathering, the loss with negatives from all, and DDP training."""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import needs
import pytest
import torch
import torch.distributed as dist
from mmrazor.registry import MODELS
from seeded import random
from tolerances import assert_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mskd_plugin  # noqa: F401  (registers the connector and the loss, in the spawned processes too)
from mskd_plugin.functional import distributed, gather_batch

PROCESSES, CHANNELS, WIDTH, CLASSES = 2, 4, 6, 3
COMBINATIONS = [
    dict(zip(("center", "symmetric", "exclude_same_class"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=3)
]
WITH_CATEGORIES = {**COMBINATIONS[-1], "complementary_weight": 3.0}


def _join(ranks, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=ranks.get(),
        world_size=PROCESSES,
        timeout=timedelta(seconds=300),
    )


def _ranked(function, args) -> tuple:
    dist.barrier()  # no process takes the other's share
    return dist.get_rank(), function(*args)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Run a function in two processes and give the results in the order of their ranks."""
    context = multiprocessing.get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(PROCESSES):
        ranks.put(rank)
    store = (tmp_path_factory.mktemp("gloo") / "store").as_uri()
    with ProcessPoolExecutor(PROCESSES, context, _join, (ranks, store)) as pool:

        def run(function, *args):
            futures = [pool.submit(_ranked, function, args) for _ in range(PROCESSES)]
            return [result for _, result in sorted(future.result() for future in futures)]

        yield run


def own_rows(whole):
    """This process's share of a batch; without processes, all of it."""
    return whole.chunk(PROCESSES)[dist.get_rank()] if dist.is_initialized() else whole


# --- gathering ---------------------------------------------------------------------------------


def _gather(count: int) -> tuple[list, list, list]:
    rank = dist.get_rank()
    local = random(count, 2, seed=10 + rank).requires_grad_()
    gathered = gather_batch(local)
    weights = random(PROCESSES * count, 2, seed=20 + rank)
    (weights * gathered.square()).sum().backward()
    labels = gather_batch(torch.arange(count) + 100 * rank)
    return gathered.tolist(), local.grad.tolist(), labels.tolist()


@pytest.mark.parametrize("count", [1, 3])
def test_gathering_joins_rows_and_sums_their_gradients(both, count):
    results = both(_gather, count)
    whole = torch.cat([random(count, 2, seed=10 + rank) for rank in range(PROCESSES)])
    factor = sum(random(PROCESSES * count, 2, seed=20 + rank) for rank in range(PROCESSES))
    grads = (2 * whole * factor).chunk(PROCESSES)
    for (gathered, grad, labels), expected in zip(results, grads, strict=True):
        assert_close(gathered, whole)
        assert_close(grad, expected)
        assert labels == [100 * rank + i for rank in range(PROCESSES) for i in range(count)]


def _gather_beside_another_branch() -> tuple[list, list]:
    rank = dist.get_rank()
    local = random(2, 3, seed=rank).requires_grad_()
    other = random(2 * PROCESSES, 3, seed=5).requires_grad_()
    # An addition hands one and the same gradient to both of its inputs. Autograd goes through what
    # was computed last first: through the gathering, then through `earlier`.
    earlier = 1 * other
    ((gather_batch(local) + earlier) * (rank + 1)).sum().backward()
    return local.grad.tolist(), other.grad.tolist()


def test_gathering_leaves_the_gradient_of_other_branches_alone(both):
    for rank, (grad, other) in enumerate(both(_gather_beside_another_branch)):
        assert_close(grad, torch.full((2, 3), 3.0))
        assert_close(other, torch.full((4, 3), rank + 1.0))


def _gather_in_a_layout_of_its_own() -> tuple[list, list]:
    rank = dist.get_rank()
    local = random(2, 3, seed=rank).requires_grad_()
    weights = random(2 * PROCESSES, 3, seed=5)
    if rank == 0:  # the same numbers, column by column in memory
        gathered = gather_batch(local.t().contiguous().t())
        (gathered.t() * weights.t().contiguous()).sum().backward()
    else:
        gathered = gather_batch(local)
        (gathered * weights).sum().backward()
    return gathered.tolist(), local.grad.tolist()


def test_gathering_takes_another_layout_from_each_process(both):
    whole = torch.cat([random(2, 3, seed=rank) for rank in range(PROCESSES)])
    grads = (PROCESSES * random(2 * PROCESSES, 3, seed=5)).chunk(PROCESSES)
    for (gathered, grad), expected in zip(both(_gather_in_a_layout_of_its_own), grads, strict=True):
        assert_close(gathered, whole)
        assert_close(grad, expected)


def test_without_a_process_group_gathering_gives_its_input():
    local = random(2, 3, seed=0)
    assert gather_batch(local) is local


def test_torch_without_processes_is_one_process(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "is_initialized")  # as where torch is built without them
    assert (distributed.world_size(), distributed.rank()) == (1, 0)


# --- the loss ----------------------------------------------------------------------------------


def _loss_and_gradient(
    count: int, settings: dict, rows=own_rows, backend: str | None = None
) -> tuple[float, list]:
    """The loss of some rows, this process's if not said, and its gradient by a shared parameter.

    With a ``backend`` it is compiled.

    The parameter maps the student's regions; the global batch holds 2 x ``count`` images.
    """
    shared = random(CHANNELS, WIDTH, seed=1).requires_grad_()
    student, teacher, labels = [], [], torch.tensor([0, 1, 0, 2, 1, 0])[: PROCESSES * count]
    for seed, regions in ((2, 1), (3, 4)):
        whole = random(PROCESSES * count, regions, WIDTH, seed=seed) + 0.3
        student.append((0.5 * rows(whole)[..., :CHANNELS]) @ shared)
        with torch.inference_mode():  # as a frozen teacher may be run
            teacher.append(rows(whole) * 1)
    module = MODELS.build({"type": "MultiScaleContrastiveLoss", "temperature": 0.3, **settings})
    arguments = (student, teacher, rows(labels), random(CLASSES, WIDTH, seed=4))
    loss = module(*arguments)
    if backend is not None:  # what the call above keeps for the device is the graph's input
        loss = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    (gradient,) = torch.autograd.grad(loss, shared)
    return loss.item(), gradient.tolist()


def mean(results):
    """Mean over processes, as data-parallel training takes it."""
    return [torch.tensor(part, dtype=torch.float64).mean(0) for part in zip(*results, strict=True)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("settings", [*COMBINATIONS, WITH_CATEGORIES], ids=str)
def test_negatives_of_all_processes_equal_one_process_with_the_whole_batch(both, settings, count):
    results = both(_loss_and_gradient, count, {**settings, "negatives": "all"})
    value, gradient = mean(results)
    expected_value, expected_gradient = _loss_and_gradient(count, settings)
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)
    assert gradient.abs().max() > 1e-3


@needs.torch_2_9
@pytest.mark.parametrize("settings", [COMBINATIONS[0], WITH_CATEGORIES], ids=str)
def test_a_compiled_loss_gathers_too(both, settings):
    settings = {**settings, "negatives": "all"}
    value, gradient = mean(both(_loss_and_gradient, 3, settings, own_rows, "aot_eager"))
    expected_value, expected_gradient = _loss_and_gradient(3, settings)
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("settings", [*COMBINATIONS, WITH_CATEGORIES], ids=str)
def test_negatives_of_this_process_equal_the_process_alone(both, settings):
    results = both(_loss_and_gradient, 3, {**settings, "negatives": "process"})
    for rank, (value, gradient) in enumerate(results):
        expected_value, expected_gradient = _loss_and_gradient(
            3, settings, rows=lambda whole, rank=rank: whole.chunk(PROCESSES)[rank]
        )
        assert_close(value, expected_value)
        assert_close(gradient, expected_gradient)


def test_where_negatives_come_from_changes_the_loss(both):
    of_all, of_process = (
        mean(both(_loss_and_gradient, 3, {"negatives": negatives}))
        for negatives in ("all", "process")
    )
    assert (of_all[0] - of_process[0]).abs() > 1e-3
    assert (of_all[1] - of_process[1]).abs().max() > 1e-3


def test_one_process_has_the_same_negatives_either_way():
    of_all, of_process = (
        _loss_and_gradient(3, {"negatives": negatives, "symmetric": True, "center": True})
        for negatives in ("all", "process")
    )
    assert of_all == of_process


# --- training ----------------------------------------------------------------------------------


class Distilled(nn.Module):
    """A student, its connector and the loss; the teacher is a map that comes with the batch."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        pooling = {"type": "MultiScaleDecouplingConnector", "scales": (1, 2)}
        channels = {"in_channels": CHANNELS, "out_channels": WIDTH}
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.student_connector = MODELS.build({**pooling, "projector": "linear", **channels})
        self.teacher_connector = MODELS.build(pooling)
        self.loss = MODELS.build({"type": "MultiScaleContrastiveLoss", **settings})
        self.double()

    def forward(self, images, teacher_maps, labels):
        return self.loss(
            self.student_connector(self.student(images)),
            self.teacher_connector(teacher_maps),
            labels,
        )


def _train(settings: dict, steps: int) -> tuple[list, list]:
    """Losses and trained parameters, under DDP where there are processes."""
    model = Distilled(settings)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        images, teacher_maps = random(6, 3, 5, 5, seed=step), random(6, WIDTH, 5, 5, seed=9 + step)
        labels = torch.tensor([0, 1, 0, 2, 1, 0])
        optimizer.zero_grad()
        loss = wrapped(own_rows(images), own_rows(teacher_maps), own_rows(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, nn.utils.parameters_to_vector(model.parameters()).tolist()


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_ddp_trains_to_the_parameters_of_one_process(both, settings):
    results = both(_train, {**settings, "negatives": "all"}, 3)
    losses, parameters = _train(settings, 3)
    untrained = nn.utils.parameters_to_vector(Distilled({}).parameters())
    assert (torch.tensor(parameters, dtype=torch.float64) - untrained).abs().max() > 1e-2
    assert_close(mean(results)[0], losses)
    for _, own in results:
        assert_close(own, parameters)
