"""A workdir belongs to one running program: a second one that is started in it is refused.

The lock is the kernel's (flock on `WORKDIR/lock`), so it ends with the process that holds it, however that ends. Other
machines see it where the file system shares locks (NFSv4, Lustre mounted with `flock`); where there are none, a warning
says so.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from train.errors import UserError
from train.workdir import writing

LOCK = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class WorkdirLock:
    """Held while it is entered."""

    def __init__(self, workdir: Path, warn: Callable[[str], None]):
        """Locks nothing yet; `warn` is told where there are no locks."""
        self._workdir, self._warn = workdir, warn

    def __enter__(self) -> "WorkdirLock":
        """Makes `workdir` where there is none. Raises UserError where it is not a directory, or another's."""
        if self._workdir.exists() and not self._workdir.is_dir():
            raise UserError(f"workdir {self._workdir} is not a directory")
        with writing(self._workdir):
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = (self._workdir / LOCK).open("a+", encoding="utf-8")
            try:
                self._take()
            except BaseException:
                self._file.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                self._warn(
                    f"workdir {self._workdir} cannot be locked ({error.strerror}): a second run that is started in it "
                    "would not be noticed"
                )
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise UserError(
                f"workdir {self._workdir} is in use by {holder}: wait for it, or stop it (SIGTERM saves), or choose "
                "another --workdir"
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
