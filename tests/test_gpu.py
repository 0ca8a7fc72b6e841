"""What only a GPU can show: no host synchronisation on the hot path, and the same numbers as on a CPU."""

import copy

import pytest
import torch
from models import tiny

import sprint

pytestmark = pytest.mark.gpu


@pytest.fixture
def model() -> sprint.SiT:
    return tiny()


def test_sparse_training_step_never_waits_for_the_device(model):
    model = model.cuda()
    x0, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    loss = sprint.FlowMatchingLoss()
    loss(model, x0, y=y, drop=sprint.StructuredDrop(0.75)).loss.backward()  # warm-up: libraries synchronise at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for drop in (sprint.StructuredDrop(0.75), sprint.RandomDrop(0.5), None):
            loss(model, x0, y=y, drop=drop).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cpu_and_gpu_agree_from_one_cpu_generator(model):
    on_gpu = copy.deepcopy(model).cuda()
    x0, y = torch.randn(4, 4, 16, 16), torch.arange(4)
    loss, drop = sprint.FlowMatchingLoss(), sprint.StructuredDrop(0.75)
    expected = loss(model, x0, y=y, drop=drop, generator=torch.Generator().manual_seed(1))
    actual = loss(on_gpu, x0.cuda(), y=y.cuda(), drop=drop, generator=torch.Generator().manual_seed(1))
    assert actual.subset is not None
    assert expected.subset is not None
    torch.testing.assert_close(actual.subset.keep.cpu(), expected.subset.keep)
    torch.testing.assert_close(actual.loss.cpu(), expected.loss, rtol=1e-3, atol=1e-4)  # float32, other kernels


def test_labels_beyond_the_classes_are_named_before_sampling(model):
    noise = torch.randn(1, 4, 16, 16, device="cuda")
    with pytest.raises(ValueError, match="class ids from 11 to 11"):
        sprint.sample(model.eval().cuda(), noise, y=torch.tensor([11], device="cuda"))
