"""`rocm-patch run --restart`: a program whose convolution hangs or crashes is started again, on the bypass.

The launcher stays, waits and passes signals on; everything else is as without it.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from rocm_patch.errors import UsageError
from rocm_patch.launch.run import Launch
from rocm_patch.machine.folders import cache_folder
from rocm_patch.settings import variable
from rocm_patch.trust.journal import EXIT_HUNG, LAUNCH_VARIABLE, RESTART_VARIABLE
from rocm_patch.trust.remains import settle
from rocm_patch.trust.store import Store

# The bypass may fail as well, in another of its algorithms each time.
MOST_RESTARTS = 3
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
_FROM_TERMINAL = 0x80  # SI_KERNEL: the terminal has sent it to the program as well
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# A program that the watchdog has ended and that is still there (torchrun waits for its workers, a driver for ever) is
# told to end after the first of these, killed after the second, and given up after the third; seconds.
_PATIENCE = (40.0, 60.0, 75.0)


def supervise(launch: Launch, say: Callable[[str], None]) -> int:
    """Run a program, and again on the bypass while a convolution ends it.

    Args:
        launch: what to run.
        say: tells the user.

    Returns:
        The exit code of the last run; 128+N for a signal.

    Raises:
        UsageError: the system refuses to start the command.
    """
    environ = dict(launch.environ)
    store = Store(cache_folder(environ))
    runs = cache_folder(environ) / "runs"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    try:
        with tempfile.TemporaryDirectory(prefix="rocm-patch-run-") as folder:
            for attempt in range(MOST_RESTARTS + 1):
                asked = Path(folder, str(attempt))
                environ[RESTART_VARIABLE], environ[LAUNCH_VARIABLE] = str(asked), uuid.uuid4().hex
                code = _run(launch, environ, asked, blocked)
                why = _why_again(code, asked, store, runs, environ[LAUNCH_VARIABLE])
                if why is None:
                    break
                if attempt == MOST_RESTARTS or code is None:
                    say(f"{why}; it is not started again\nhint: rocm-patch doctor")
                    break
                say(f"{why}; starting it again on the bypass\nhint: rocm-patch cache show tells what happened")
                environ[variable("conv")] = "bypass"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if code is None:
        return EXIT_HUNG
    return code if code >= 0 else 128 - code


def _run(launch: Launch, environ: dict[str, str], asked: Path, mask: set[int | signal.Signals]) -> int | None:
    """The program's return code as subprocess has it; None for one that cannot be killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        # Without us nobody passes signals on.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        process = subprocess.Popen(launch.argv, env=environ, preexec_fn=in_child)
    except OSError as error:
        raise UsageError(
            f"cannot run {launch.argv[0]!r}: {error.strerror}", "check that it is an executable file"
        ) from error
    since: float | None = None
    steps = list(zip(_PATIENCE, (signal.SIGTERM, signal.SIGKILL, None), strict=True))
    while process.poll() is None:
        received = signal.sigtimedwait({*_PASSED_ON, signal.SIGCHLD}, 0.5)
        if received is not None and received.si_signo in _PASSED_ON and received.si_code != _FROM_TERMINAL:
            process.send_signal(received.si_signo)
        # After a crash that was raised as an error the program may be busy saving its work.
        if since is None and asked.exists() and asked.read_text(encoding="utf-8").startswith("hang"):
            since = time.monotonic()
        while since is not None and steps and time.monotonic() - since > steps[0][0]:
            number = steps.pop(0)[1]
            if number is None:
                return None
            process.send_signal(number)
    return process.returncode


def _why_again(code: int | None, asked: Path, store: Store, runs: Path, launch: str) -> str | None:
    """Why a program is to be started again, None if a convolution is not what ended it."""
    left = [remains for remains in settle(store, runs) if remains.launch == launch]
    calls = [call for remains in left for call in remains.attempt or remains.proven]
    if code is None:
        return "the program cannot be killed: the kernel holds it"
    if code == 0:
        return None
    if asked.exists():
        return f"the program ended after a convolution failed ({asked.read_text(encoding='utf-8').strip()})"
    crashed = -code in _CRASHES or any(remains.stack for remains in left)
    if not (crashed and calls):
        return None
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}, and a crash below it"
    return f"the program crashed ({how}); its last convolution was {calls[0].strategy} of {calls[0].label}"
