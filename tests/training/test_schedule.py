"""Schedules and data order: functions of the step and the position alone, the same for any number of processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint import StructuredDrop
from sprint.training import Stage, TwoStage
from sprint.training.order import Batches, DataOrder, seed_of

DROP = StructuredDrop(0.75)
FIRST = Stage(steps=10, batch=4, lr=1.0, drop=DROP, warmup=2)


def test_the_switch_changes_drop_rate_and_batch_and_warms_up_again():
    schedule = TwoStage(FIRST, Stage(steps=6, batch=12, lr=4.0, warmup=4))
    moments = [schedule.at(step) for step in range(schedule.steps)]
    assert [m.stage for m in moments] == [0] * 10 + [1] * 6
    assert [m.drop for m in moments] == [DROP] * 10 + [None] * 6
    assert [m.lr for m in moments] == [0.5] + [1.0] * 9 + [1, 2, 3, 4, 4, 4]
    assert [m.images for m in moments] == [4 * i for i in range(10)] + [40 + 12 * i for i in range(6)]


@pytest.mark.parametrize(("decay", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_decays(decay, middle):
    stage = Stage(steps=12, batch=1, lr=1.0, warmup=2, decay=decay)
    assert stage.rate(2) == 1.0
    assert stage.rate(7) == pytest.approx(middle)
    assert stage.rate(11) == (1.0 if decay == "constant" else pytest.approx(0.1 if decay == "linear" else 0.0245, abs=1e-3))


def test_a_single_stage():
    assert TwoStage(FIRST).steps == 10
    with pytest.raises(ValueError, match="this run has steps 0 to 9, got 10"):
        TwoStage(FIRST).at(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1, got 0"),
        ({"batch": 0}, "at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": 11}, "warmup must be 0 to 10"),
        ({"decay": "step"}, "decay of Stage must be one of 'constant', 'linear', 'cosine', got the text 'step'"),
    ],
)
def test_bad_stages(options, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{"steps": 10, "batch": 1, "lr": 1.0, **options})


def test_the_second_stage_takes_no_drop():
    with pytest.raises(ValueError, match="second stage trains on all tokens"):
        TwoStage(FIRST, FIRST)


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 50), st.integers(0, 50))
def test_order_is_a_function_of_the_position(count, position, a, b):
    order = DataOrder(count, seed=1)
    assert order.take(position, a + b) == DataOrder(count, seed=1).take(position, a) + order.take(position + a, b)
    assert sorted(order.take(7 * count, count)) == list(range(count))


def test_epochs_and_seeds_differ():
    order = DataOrder(100, seed=0)
    assert order.take(0, 100) != order.take(100, 100)
    assert order.take(0, 100) != DataOrder(100, seed=1).take(0, 100)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.integers(0, 15))
def test_a_step_takes_the_same_samples_for_any_number_of_processes(processes, accumulate, start):
    schedule = TwoStage(Stage(steps=10, batch=12, lr=1.0), Stage(steps=6, batch=24, lr=1.0))
    order = DataOrder(50)
    plans = [
        Batches(order, schedule, start, 16, share=(process, processes), accumulate=accumulate)
        for process in range(processes)
    ]
    taken = [index for calls in zip(*plans, strict=True) for call in calls for index in call]
    assert taken == order.take(schedule.at(start).images, len(taken))
    assert len(taken) == 12 * max(0, 10 - start) + 24 * min(6, 16 - start)
    assert all(len(list(plan)) == len(plan) for plan in plans)


def test_batches_must_split():
    with pytest.raises(ValueError, match="a batch of 4 images does not split into 3 processes of 1 calls"):
        Batches(DataOrder(5), TwoStage(FIRST), 0, 10, share=(0, 3))


def test_seeds_of_neighbours_differ():
    seeds = {seed_of(0, step, call, process) for step in range(20) for call in range(3) for process in range(4)}
    assert len(seeds) == 240
    assert all(0 <= seed < 2**63 for seed in seeds)
