"""A workdir is one program's at a time."""

import errno
import fcntl
import os
import re
import subprocess
import sys

import pytest

from train.errors import UserError
from train.lock import WorkdirLock

HOLD = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"


def nothing(message: str) -> None:
    raise AssertionError(message)


def test_a_workdir_in_use_is_refused_until_it_is_free(tmp_path):
    with WorkdirLock(tmp_path / "new/run", nothing):
        for _ in range(2):  # the first refusal must not let go of it
            with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*: wait for it, or stop it"):
                WorkdirLock(tmp_path / "new/run", nothing).__enter__()
    with WorkdirLock(tmp_path / "new/run", nothing):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        process.stdout.readline()
        with pytest.raises(UserError, match="is in use by another process"):
            WorkdirLock(tmp_path, nothing).__enter__()
        process.kill()
        process.wait()
        with WorkdirLock(tmp_path, nothing):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    warnings = []
    with WorkdirLock(tmp_path, warnings.append):
        (warning,) = warnings
    assert re.search(r"cannot be locked \(No locks available\): a second run .* would not be noticed", warning)


def test_a_second_run_in_a_workdir_changes_nothing(finished, tiny, user_error):
    def content():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.rglob("*")}

    with WorkdirLock(finished, nothing):
        before = content()
        assert f"workdir {finished} is in use by process" in user_error(tiny(finished, log_every=1))
        assert content() == before
