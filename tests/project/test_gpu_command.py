"""`python -m benchmarks.gpu`: every part runs at toy size, what is there is not done again, a failure spares the rest."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import fit  # noqa: E402
from benchmarks.gpu.__main__ import main  # noqa: E402
from benchmarks.gpu.driver import PARTS, QUICK, UNFINISHED, claim, drive, launch  # noqa: E402
from benchmarks.gpu.fit import line_of, nonnegative  # noqa: E402
from benchmarks.gpu.kinds import kind_of  # noqa: E402
from benchmarks.gpu.table import STARTED, Table, read  # noqa: E402

ENV = {"device": "a card", "torch": "2", "triton": "3", "commit": "abc", "command": "python"}


def states(out):
    return {row["part"]: row["state"] for row in read(out / "parts.csv")}


def command(out, *options):
    line = [sys.executable, "-m", "benchmarks.gpu", "--out", out, "--dry-run", *options]
    return subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT, timeout=600).stdout


@pytest.mark.slow
def test_a_dry_run_does_every_part_and_a_second_one_nothing(tmp_path):
    command(tmp_path)
    files = sorted(tmp_path.iterdir())  # and no lock
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
        if end == "interrupt":
            raise KeyboardInterrupt
        error = STARTED if end == "crash" and not read(self.out / f"{name}.csv") else "no memory" if end == "errors" else ""
        table = Table(self.out / f"{name}.csv", env=ENV, keys=("key",), deadline=0)
        if end != "nothing":
            table.put([{"key": "two" if table.rows else "one", "error": error}] if len(table.rows) < 2 else [])
        self.now += seconds if end == "hang" else 1
        return {"hang": None, "nothing": 1, "errors": 0, "crash": -6 if error else 0}.get(end, end)

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
    assert [row["error"] for row in read(tmp_path / "exactness.csv")] == ["the process ended with -6", ""]
    again = Parts(tmp_path)
    assert run(tmp_path, again, again=["hosts"]) == 0
    assert again.begun[:4] == ["tests", "train_step", "sampling", "hosts"]  # and the fit, of a newer table
    assert set(states(tmp_path).values()) == {"finished"}


def test_results_that_are_to_be_measured_anew_stay_until_that_begins(tmp_path, capsys):
    run(tmp_path, Parts(tmp_path))
    before = (tmp_path / "hosts.csv").read_bytes()
    run(tmp_path, Parts(tmp_path), seconds=40, again=["hosts"])
    assert "== hosts: kept as it was, 10 s left, it needs 30" in capsys.readouterr().out
    assert (tmp_path / "hosts.csv").read_bytes() == before
    assert states(tmp_path)["hosts"] == "finished"
    run(tmp_path, Parts(tmp_path, hosts="nothing"), again=["hosts"])
    assert not (tmp_path / "hosts.csv").exists()
    assert states(tmp_path)["hosts"] == "failed"


@pytest.mark.parametrize("cut", [0, 8, -2, -12, "row", b"\0\xff"])
def test_a_part_whose_file_is_cut_is_measured_anew(tmp_path, cut):
    run(tmp_path, Parts(tmp_path, hosts=UNFINISHED))
    run(tmp_path, Parts(tmp_path))  # the second row
    file = tmp_path / "hosts.csv"
    whole = file.read_bytes()
    rows = whole.splitlines(keepends=True)
    assert len(rows) == 3
    file.write_bytes(cut if isinstance(cut, bytes) else b"".join(rows[:2]) if cut == "row" else whole[:cut])
    parts = Parts(tmp_path)
    run(tmp_path, parts)
    assert parts.begun == ["hosts"]
    assert file.read_bytes() == b"".join(rows[:2])


def test_a_part_of_errors_alone_failed_and_is_tried_anew(tmp_path):
    assert run(tmp_path, Parts(tmp_path, hosts="errors")) == 1
    row = next(row for row in read(tmp_path / "parts.csv") if row["part"] == "hosts")
    assert (row["state"], row["reason"]) == ("failed", "every unit, the first by no memory")
    assert run(tmp_path, Parts(tmp_path)) == 0
    assert [row["error"] for row in read(tmp_path / "hosts.csv")] == [""]


@pytest.mark.parametrize("kept", [0, 100, 1 / 2, -3])
def test_parts_whose_state_is_lost_are_gone_through_however_little_time_there_is(tmp_path, kept):
    run(tmp_path, Parts(tmp_path))
    file = tmp_path / "parts.csv"
    text = file.read_bytes()
    file.write_bytes(text[: int(kept * len(text)) if isinstance(kept, float) else kept])
    lost = [name for name in PARTS if name not in {row["part"] for row in read(file)[:-1]}]
    parts = Parts(tmp_path)
    run(tmp_path, parts, seconds=5 + 25 + QUICK + len(PARTS))
    assert parts.begun == lost
    assert set(states(tmp_path).values()) == {"finished"}


def test_an_interruption_is_recorded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Parts(tmp_path, hosts="interrupt"))
    row = read(tmp_path / "parts.csv")[-1]
    assert (row["part"], row["state"], row["reason"]) == ("hosts", "not finished", "interrupted")


def test_results_of_another_commit_are_told_and_of_another_device_refused(tmp_path, capsys):
    def call(**changes):
        parts = Parts(tmp_path)
        drive(tmp_path, env={**ENV, **changes}, deadline=540, dry=False, start=parts, clock=parts.clock)
        return parts.begun

    call()
    assert "another commit" not in capsys.readouterr().out
    assert call(commit="def") == []
    assert "another commit or torch: tests of commit abc, torch 2; exactness of commit abc" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"tests.csv is of a card, this is another card"):
        call(device="another card")


STAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.executable = sys.argv.pop(1)
from benchmarks.gpu.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_stops_the_part_that_runs(tmp_path, name, code):
    (tmp_path / "stand.py").write_text(STAND)
    part = tmp_path / "part"
    part.write_text("#!/bin/sh\necho begun $$\nexec sleep 300\n")
    part.chmod(0o755)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "stand", part, "--out", out, "--dry-run"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    begun = next(line for line in process.stdout if line.startswith("begun"))
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code
    assert not errors
    with pytest.raises(ProcessLookupError):
        os.killpg(int(begun.split()[1]), 0)
    assert [(row["part"], row["state"], row["reason"]) for row in read(out / "parts.csv")] == [
        ("tests", "not finished", "interrupted")
    ]
    assert [file.name for file in out.iterdir()] == ["parts.csv"]


def test_a_signal_while_a_part_is_being_started_stops_it_too(monkeypatch):
    begun = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            begun.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(["sleep", "300"], 100)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun[0].returncode == -signal.SIGKILL


def refused(out, *options):
    line = [sys.executable, "-m", "benchmarks.gpu", "--out", out, "--dry-run", "--minutes", "0", *options]
    ended = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def test_a_second_driver_and_a_foreign_table_are_refused(tmp_path):
    with claim(tmp_path):
        assert "another process is measuring there" in refused(tmp_path)
    (tmp_path / "parts.csv").write_text("name,size\na,1\n")
    assert "it is not ours" in refused(tmp_path)


@pytest.mark.parametrize("minutes", ["nan", "-1"])
def test_minutes_are_a_number(tmp_path, minutes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), "--dry-run", f"--minutes={minutes}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--minutes must be 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_is_a_folder(tmp_path):
    (tmp_path / "file").touch()
    assert f"error: --out {tmp_path / 'file'}: [Errno 17] File exists" in refused(tmp_path / "file")


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


def test_rates_that_are_none_are_not_to_be_copied():
    assert line_of("mine", flops=4e14, update=2e-11, launch=0.0).startswith("Hardware(")
    for flops in (float("inf"), float("nan"), 0.0):
        assert line_of("mine", flops=flops, update=2e-11, launch=0.0).startswith("mine: could not be fitted")


def test_a_fit_that_fails_leaves_the_one_before(tmp_path):
    def table():
        return Table(tmp_path / "cost.csv", env=ENV, keys=fit.KEYS, deadline=0)

    fit.run(table(), dry=True)
    assert "no step" in read(tmp_path / "cost.csv")[0]["error"]
    fit.run(table(), dry=True)  # an error gives way to another
    table().put([{"implementation": "all", "job": "", "path": "", "error": "", "line": "Hardware(...)"}])
    before = (tmp_path / "cost.csv").read_bytes()
    with pytest.raises(ValueError, match="the one before stays"):
        fit.run(table(), dry=True)
    assert (tmp_path / "cost.csv").read_bytes() == before


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
