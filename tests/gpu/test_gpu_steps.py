"""What only a GPU can show of captured steps: what is found out before a capture, what a failed one leaves, what is seen."""

import copy

import pytest
import torch
from models import tiny

import sprint
from sprint.capture.graphs import CudaGraph

pytestmark = pytest.mark.gpu

SPARSE = sprint.StructuredDrop(0.75)


def square(model, x):
    return model(x).square().mean()


def test_a_step_that_reads_the_device_is_found_out_before_a_capture():
    model = torch.nn.Linear(4, 1).cuda()

    def loss(model, x):
        value = square(model, x)
        value.item()
        return value

    step = sprint.TrainStep(model, loss, torch.optim.AdamW(model.parameters(), fused=True), compile=False)
    x = torch.randn(8, 4, device="cuda")
    with pytest.warns(RuntimeWarning, match=r"runs as plain code: it waits for the device \(test_gpu_steps.py, line"):
        outs = [step(x) for _ in range(7)]
    assert not any(out.captured for out in outs)
    assert outs[-1].loss < outs[0].loss


def test_a_failed_capture_leaves_the_process_usable():
    """Stream, pool and generator; a graph from before goes on."""
    x, stream, current = torch.randn(4, device="cuda"), torch.cuda.Stream(), torch.cuda.current_stream()
    first = CudaGraph(stream)
    first.capture(lambda: x + 1, [])
    with pytest.raises(RuntimeError, match="captur"):
        CudaGraph(stream).capture(lambda: x.sum().item(), [])
    with pytest.raises(ZeroDivisionError):
        CudaGraph(stream).capture(lambda: (x + 1, 1 / 0), [])
    assert torch.cuda.current_stream() == current
    torch.cuda.manual_seed(0)
    expected = torch.rand(4, device="cuda")
    again = CudaGraph(stream)
    again.capture(lambda: torch.rand(4, device="cuda"), [])
    torch.cuda.manual_seed(0)
    torch.testing.assert_close(again.replay(), expected)
    torch.testing.assert_close(first.replay(), x + 1)
    kept = again.output
    del first, again
    anew = CudaGraph(stream)
    anew.capture(lambda: x + 2, [])  # though the pool of the graphs that are gone still holds a tensor
    torch.testing.assert_close(anew.replay(), x + 2)
    assert kept.shape == (4,)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, sprint.AdamW])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_windows_loads_and_frozen_weights(optimizer, accumulate):
    """A loop in which this and that changes, captured and plain."""

    def run(capture):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]).cuda()
        opt = optimizer(model.parameters(), lr=0.01, weight_decay=0.1)
        step = sprint.TrainStep(
            model, lambda m, x, both: square(m[0], x) + (square(m[1], x) if both else 0), opt, accumulate=accumulate,
            autocast=torch.bfloat16, compile=False, capture=capture, warmup=1, clip=1.0,
        )  # fmt: skip
        captured = []
        for i in range(12 * accumulate):
            if i == 6 * accumulate:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            model[0].bias.requires_grad_(i < 8 * accumulate)
            square(model[1], torch.ones(2, 4, device="cuda")).backward()  # of no concern to the step
            x = torch.full((2, 4), 0.1 * i, device="cuda")
            captured.append(step(x, both=i // accumulate % 2 == 0).captured)
        return captured, [p.detach() for p in model.parameters()]

    captured, actual = run(None)
    assert all(captured[-accumulate:])
    _, expected = run(False)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # float32 sums of bfloat16 products


def test_arguments_on_the_cpu():
    """Numbers as tensors are copied to the device; a generator there could only be built in."""
    model = torch.nn.Linear(4, 4).cuda().eval()
    model.forward = lambda x, t, generator=None: torch.nn.functional.linear(x, model.weight) * t
    fast = sprint.CapturedModel(model, compile=False, warmup=1)
    x = torch.randn(2, 4, device="cuda")
    for t in (torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)):
        torch.testing.assert_close(fast(x, t), model(x, t).detach())
    assert fast._graphs is not None
    assert fast._graphs.captured == 1
    generator = torch.Generator()
    fast(x, x, generator)
    with pytest.warns(RuntimeWarning, match="a generator on cpu draws outside of a graph"):
        fast(x, x, generator)


def test_checkpointing_with_copies_and_compiled_blocks():
    model = tiny()
    step = sprint.TrainStep(
        model.cuda().train().set_checkpointing(), sprint.FlowMatchingLoss(), sprint.AdamW(model.parameters()),
        autocast=torch.bfloat16,
    )  # fmt: skip
    x, y = torch.randn(4, 4, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    outs = [step(x, y=y, drop=SPARSE) for _ in range(5)]
    assert outs[-1].captured
    assert outs[-1].loss.isfinite()


def test_the_kernel_goes_through_channels_last_and_leaves_mixed_layouts_alone():
    results = []
    for device, layout in (
        ("cpu", torch.contiguous_format),
        ("cuda", torch.channels_last),
        ("cuda", torch.contiguous_format),
    ):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(3, 5, 7, 2).to(device, memory_format=torch.channels_last))
        optimizer = sprint.AdamW([weight], lr=torch.tensor(0.1))
        for _ in range(2):
            weight.grad = torch.randn(3, 5, 7, 2).to(device, memory_format=layout)
            version = weight._version
            optimizer.step()
            assert weight._version > version
        results.append(weight.detach().cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)  # float32
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-6)
