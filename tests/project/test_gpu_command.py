"""`python -m benchmarks.gpu`: every part runs at toy size, what is there is not done again, a failure spares the rest."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.driver import PARTS, UNFINISHED, drive  # noqa: E402
from benchmarks.gpu.fit import nonnegative  # noqa: E402
from benchmarks.gpu.kinds import kind_of  # noqa: E402
from benchmarks.gpu.table import STARTED, Table, read  # noqa: E402

ENV = {"device": "a card", "torch": "2", "triton": "3", "commit": "abc", "command": "python"}


def states(out):
    return {row["part"]: row["state"] for row in read(out / "parts.csv")}


def command(out, *options):
    line = [sys.executable, "-m", "benchmarks.gpu", "--out", out, "--dry-run", *options]
    return subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT, timeout=600).stdout


def test_a_dry_run_does_every_part_and_a_second_one_nothing(tmp_path):
    command(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.stem for file in files] == sorted(["parts", *PARTS])
    assert len(files) <= 8
    for file in files:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert rows
        assert all(row["device"] and row["torch"] and row["triton"] and row["commit"] for row in rows)
        errors = [row["error"] for row in rows if row.get("error")]
        assert all("No module named" in error for error in errors), errors  # of an extra that is not installed
    assert set(states(tmp_path).values()) == {"finished"}
    before = {file: file.read_bytes() for file in files}
    out = command(tmp_path)
    assert [line for line in out.splitlines() if line.startswith("==")] == [f"== {name}: is there" for name in PARTS]
    assert {file: file.read_bytes() for file in files} == before


class Parts:
    """Stands for the processes: writes a row for each part, unless it was told another end."""

    def __init__(self, out, **ends):
        self.out, self.ends, self.now, self.begun = out, ends, 0.0, []

    def __call__(self, line, seconds):
        name = line[line.index("--part") + 1]
        self.begun.append(name)
        end = self.ends.get(name, 0)
        error = STARTED if end == "crash" and not read(self.out / f"{name}.csv") else ""
        table = Table(self.out / f"{name}.csv", env=ENV, keys=("key",), deadline=0)
        if end != "nothing":
            table.put([{"key": "one", "error": error}] if not table.rows else [])
        self.now += seconds if end == "hang" else 1
        return {"hang": None, "nothing": 1, "crash": -6 if error else 0}.get(end, end)

    def clock(self):
        return self.now


def run(out, parts, *, seconds=540, **options):
    return drive(out, env=ENV, deadline=parts.now + seconds, dry=False, start=parts, clock=parts.clock, **options)


def test_failures_and_hangs_are_recorded_and_spare_the_rest(tmp_path):
    parts = Parts(tmp_path, tests="nothing", exactness="crash", train_step=UNFINISHED, sampling="hang")
    assert run(tmp_path, parts) == 1
    expected = dict.fromkeys(PARTS, "finished")
    expected |= {"tests": "failed", "train_step": "not finished", "sampling": "not finished"}
    assert states(tmp_path) == expected
    assert parts.begun == ["tests", "exactness", "exactness", "train_step", "sampling", "hosts", "profile", "cost"]
    assert [row["error"] for row in read(tmp_path / "exactness.csv")] == ["the process ended with -6"]
    again = Parts(tmp_path)
    assert run(tmp_path, again, again=["hosts"]) == 0
    assert again.begun[:4] == ["tests", "train_step", "sampling", "hosts"]  # and the fit, of a newer table
    assert set(states(tmp_path).values()) == {"finished"}


@pytest.mark.parametrize("seconds", [0, 40, 100, 300])
def test_no_part_goes_beyond_the_time(tmp_path, seconds):
    parts = Parts(tmp_path, **dict.fromkeys(PARTS, "hang"))
    run(tmp_path, parts, seconds=seconds)
    assert parts.now <= seconds
    assert list(states(tmp_path)) == list(PARTS)
    skipped = [row for row in read(tmp_path / "parts.csv") if row["state"] == "skipped"]
    assert all(row["reason"].endswith(f"it needs {PARTS[row['part']].least:.0f}") for row in skipped)
    if seconds == 0:
        assert not parts.begun


def test_no_minutes_skip_everything(tmp_path):
    out = command(tmp_path, "--minutes", "0")
    assert out.count(": skipped, 0 s left") == len(PARTS)
    with pytest.raises(ValueError, match="choose another folder"):
        run(tmp_path, Parts(tmp_path))


def test_a_unit_that_fails_becomes_a_row_and_one_without_time_is_left(tmp_path):
    def table(seconds):
        return Table(tmp_path / "t.csv", env=ENV, keys=("key",), deadline=time.monotonic() + seconds)

    def fail():
        raise RuntimeError("out of\nmemory")

    def never():
        raise AssertionError

    first = table(1000)
    first.unit([{"key": 1}], fail, needs=10)
    first.unit([{"key": 2}], lambda: [{"key": 2, "ms": 3.0}], needs=10)
    first.unit([{"key": 3}], never, needs=2000)
    assert not first.complete
    rows = read(tmp_path / "t.csv")
    assert [(row["key"], row["error"], row.get("ms")) for row in rows] == [
        ("1", "RuntimeError: out of memory", ""), ("2", "", "3.0")
    ]  # fmt: skip
    second = table(1000)
    second.unit([{"key": 1}], never, needs=10)
    second.unit([{"key": 2}], never, needs=10)
    second.unit([{"key": 3}], lambda: [{"key": 3}], needs=10)
    assert second.complete
    with pytest.raises(SystemExit):
        second.unit([{"key": 4}], lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: illegal access")), needs=0)
    assert [row["key"] for row in read(tmp_path / "t.csv")] == ["1", "2", "3", "4"]


def test_the_fit_finds_the_constants_of_exact_times():
    rows = [[3e13, 7e8], [9e13, 7e8], [8e13, 7e8]]
    product, update = nonnegative(rows, [a / 4e14 + b * 2e-11 for a, b in rows])
    assert product == pytest.approx(1 / 4e14)
    assert update == pytest.approx(2e-11)
    product, update = nonnegative(rows, [a / 4e14 - b * 1e-12 for a, b in rows])
    assert product > 0
    assert update == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("triton_poi_fused_gelu_3", "element-wise"),
        ("triton_red_fused_native_layer_norm_2", "reductions"),
        ("_adamw", "update of the weights"),
        ("Memcpy DtoD (Device -> Device)", "copies, fills"),
        ("_backward", "our kernels in blocks"),
        ("triton_poi_fused__scaled_dot_product_flash_attention__to_copy_1", "element-wise"),
    ],
)
def test_kernels_have_a_kind(name, kind):
    assert kind_of(name) == kind
