"""Start a command that the kernel ends when its parent dies: ``tether SIGNAL PARENT COMMAND …`` (Linux).

A program of its own, because the request must be made in the new process, and running Python between fork and exec
of a process that has threads can hang. Standard library only; started with ``-I -S``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal, make sure the parent did not die before, and become the command."""
    death_signal, parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.Signals[f"SIG{death_signal}"]))
    if os.getppid() != int(parent):
        sys.exit(0)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
