"""Checkpoints of a run: the newest whole one is always there."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from sprint import checkpoint
from sprint.training import RunFolder


def state(step):
    return {"step": step, "weights": torch.full((3,), float(step))}


def test_old_states_are_deleted_after_the_new_one_is_whole(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, keep=2)
    assert run.newest() is None
    for step in (5, 10, 15):
        run.save(step, state(step))
    assert run.steps == [10, 15]
    step, found = run.newest()
    assert (step, found["step"], found["weights"].tolist()) == (15, 15, [15.0] * 3)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        run.save(20, state(20))
    assert run.steps == [10, 15]
    assert {path.name for path in run.folder.iterdir()} == {"00000010.safetensors", "00000015.safetensors"}


def test_safetensors_own_report_of_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise checkpoint.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*No space left on device"):
        RunFolder(tmp_path).save(1, state(1))


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    run = RunFolder(tmp_path)
    (run.folder / ".00000001.safetensors.abc.tmp").write_bytes(b"half")
    run.save(2, state(2))
    assert [path.name for path in run.folder.iterdir()] == ["00000002.safetensors"]


def test_a_broken_state_is_named_and_passed_over(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.save(step, state(step))
    run.path(2).write_bytes(run.path(2).read_bytes()[:-3])
    with pytest.warns(RuntimeWarning, match=r"00000002.safetensors is not a whole safetensors file .*going back"):
        assert run.newest()[0] == 1
    assert run.path(2).exists()  # evidence is left to the user


def test_a_dangling_link_and_a_folder_are_passed_over(tmp_path):
    run = RunFolder(tmp_path)
    run.save(1, state(1))
    run.path(2).symlink_to(tmp_path / "gone")
    run.path(3).mkdir()
    with pytest.warns(RuntimeWarning, match="going back to the one before"):
        assert run.newest()[0] == 1


def test_keep_only_the_last(tmp_path):
    run = RunFolder(tmp_path, keep=1)
    for step in (1, 2, 3):
        run.save(step, state(step))
        assert run.steps == [step]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        RunFolder(tmp_path, keep=0)


CLAIM = """
import os, signal, sys, sprint
run = sprint.training.RunFolder(sys.argv[1])
run.lock()
if (worker := os.fork()) == 0:
    signal.pause()
print(worker, flush=True)
signal.pause()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_the_lock_of_a_killed_process_is_not_held_by_its_workers(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match="another process is training in"):
            RunFolder(tmp_path).lock()
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)  # it lives
        RunFolder(tmp_path).lock()
    finally:
        process.kill()
        process.stdout.close()
        os.kill(worker, signal.SIGKILL)


def test_one_object_of_a_process_holds_the_lock_at_a_time(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    run.lock()
    with pytest.raises(ValueError, match="another part of this process is training in"):
        RunFolder(tmp_path).lock()
    del run
    RunFolder(tmp_path).lock()
