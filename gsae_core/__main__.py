"""`gsae` and `python -m gsae_core`, on standard streams whose reader may leave before the end."""

import errno
import io
import os
import sys
from typing import Any, NoReturn

from gsae_core.cli.main import main

READER_LEFT = 128 + 13  # what shells report of a program that SIGPIPE ended


class Lasting(io.FileIO):
    """A standard stream that can be written to after its reader has gone (`| head -1`).

    From then on its descriptor is /dev/null, for this process, its libraries and processes it
    starts later. A command that only prints an answer ends instead.
    """

    def __init__(self, fd: int, *, answers: bool) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._answers = answers

    def write(self, data: Any) -> int | None:
        """Write bytes; where the reader has left, end or throw them away."""
        try:
            return super().write(data)
        except OSError as error:
            # EIO: of a terminal that is no more.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self._answers:
            raise SystemExit(READER_LEFT)
        return len(data)


def program() -> NoReturn:
    """Run the command that `sys.argv` holds, and exit with its code."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed by the shell (`>&-`): a file would take its place
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    # Printing is all that these do, so that they may end with their reader.
    answers = sys.argv[1:2] in (["list"], ["doctor"]) or not {"-h", "--help"}.isdisjoint(sys.argv)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)  # None: it was closed
        lasting = io.TextIOWrapper(
            io.BufferedWriter(Lasting(fd, answers=answers)),
            encoding=getattr(before, "encoding", "utf-8"),
            errors=getattr(before, "errors", None),
            line_buffering=True,
        )
        setattr(sys, name, lasting)
    try:
        code = main()
    finally:
        # Here and not when Python ends, where a reader that has left could no longer set the code.
        sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    program()
