"""The rates of devices: formula, data sheets, the fit, and that a measurement runs (its accuracy is for the benchmark)."""

import dataclasses
import types

import pytest
import torch

from sprint import Hardware
from sprint.costs import hardware
from sprint.costs.counting import PathCost
from sprint.costs.hardware import KNOWN, nonnegative_fit

WORK = PathCost(forward=1e12, backward=2e12, activations=0, operations=1000, traffic=6e9)


def test_a_gpu_computes_while_it_launches_and_a_cpu_does_not():
    rates = {"flops": 1e12, "update": 1e-9, "launch": 4e-3, "bandwidth": 3e9}
    gpu, cpu = Hardware("gpu", **rates), Hardware("cpu", **rates, captures=False)
    assert gpu.seconds(WORK, 10**9, captured=True) == pytest.approx(3 + 2 + 1)
    assert gpu.seconds(WORK, 10**9) == pytest.approx(max(3 + 2, 4) + 1)
    assert cpu.seconds(WORK, 10**9) == pytest.approx(3 + 2 + 4 + 1)


def test_other_cards_are_scaled_by_their_data_sheets_and_say_so():
    h100 = KNOWN["H100"]
    assert list(KNOWN) == ["H100", "H200", "A100", "RTX 4090"]
    assert [card.memory // 2**30 for card in KNOWN.values()] == [80, 141, 80, 24]
    assert KNOWN["A100"].flops / h100.flops == pytest.approx(312 / 989)
    assert KNOWN["A100"].update / h100.update == pytest.approx(3.35 / 2.04)
    assert "fitted to measured steps" in h100.source
    assert all("not measured" in card.source for name, card in KNOWN.items() if name != "H100")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GB10", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-PCIE-40GB", None),
    ],
)
def test_a_card_is_known_by_its_name_and_has_its_own_memory(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = types.SimpleNamespace(name=name, total_memory=39 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = hardware.present()
    if known is None:
        assert found == "this machine"
    else:
        assert isinstance(found, Hardware)
        assert (found.name, found.flops, found.memory) == (known, KNOWN[known].flops, card.total_memory)


def test_the_fit_finds_the_terms_and_none_is_negative():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(6, 4, generator=generator, dtype=torch.float64) * torch.tensor([1e11, 1e9, 1e3, 1e7])
    terms = torch.tensor([1e-11, 1e-10, 1e-5, 5e-9], dtype=torch.float64)
    assert nonnegative_fit(rows.tolist(), (rows @ terms).tolist()) == pytest.approx(terms.tolist(), rel=1e-6)
    assert nonnegative_fit([[1.0, 1.0], [1.0, 2.0]], [2.0, 1.9]) == pytest.approx([1.95, 0.0], rel=0.02)


def test_measuring_this_cpu(monkeypatch):
    before = torch.get_rng_state()
    here = Hardware.measure("cpu", seconds=0.0)
    assert torch.get_rng_state().equal(before)
    assert here.source.startswith("measured here")
    assert not here.captures
    assert here.memory is None or here.memory > 2**28
    with torch.inference_mode():
        Hardware.measure("cpu", torch.bfloat16, seconds=0.0)


def test_rates_that_do_not_fit_say_so(monkeypatch):
    """Times without any relation to the work, as other work on the machine may leave."""
    monkeypatch.setattr(hardware, "_fastest", lambda jobs, **_: [1e-3, 1.0, 1e-3, 1e-3])
    assert "unreliable" in Hardware.measure("cpu", seconds=0.0).source


def test_this_machine_is_measured_once_for_each_number_of_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_MEASURED", {})
    calls = []
    sources = iter(["measured here", hardware.UNRELIABLE, "measured here"])
    monkeypatch.setattr(
        Hardware, "measure", lambda *args: calls.append(args) or dataclasses.replace(KNOWN["H100"], source=next(sources))
    )
    for threads in (2, 1, 2, 1, 1):  # what was unreliable is measured again
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        hardware.find(" This machine")
    assert calls == [("cpu",)] * 3


def test_bad_input():
    with pytest.raises(ValueError, match="can measure a CPU or a CUDA device that is there, got meta"):
        Hardware.measure("meta")
    with pytest.raises(ValueError, match="can measure a CPU or a CUDA device that is there, got toaster"):
        Hardware.measure("toaster")
    with pytest.raises(ValueError, match="seconds must be at least 0, got -1"):
        Hardware.measure("cpu", seconds=-1)
    for memory, error in ((-5, ValueError), (0, ValueError), ("80GB", TypeError)):
        with pytest.raises(error, match="memory .*must be"):
            Hardware("mine", flops=1.0, update=0.0, launch=0.0, memory=memory)
    for wrong in ({"flops": 0.0}, {"bandwidth": -1.0}, {"update": -1.0}, {"launch": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            Hardware("mine", **{"flops": 1.0, "update": 0.0, "launch": 0.0, **wrong})
    with pytest.raises(ValueError, match="unknown hardware 'H1000'"):
        hardware.find("H1000")
