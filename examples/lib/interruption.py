"""Ctrl-C and SIGTERM in a training: finish the step, save a checkpoint, and say how to go on."""

import os
import shlex
import signal
import sys
import time

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers pass on a signal that the terminal has sent to all processes already.
SAME_SIGNAL = 1.0


class Interrupted(Exception):  # noqa: N818  no error: a training that ended early, as it was asked to
    """A training was asked to stop, and has saved a checkpoint; `code` is the exit status that says so."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.code = 128 + signum


class Interruption(TrainerCallback):
    """Ends the training after the step in which a signal came to any process, with a checkpoint to resume from.

    Within `with interruption:` signals are noted, and a second Ctrl-C raises KeyboardInterrupt. `stopped` is the same
    on all processes.
    """

    def __init__(self):
        self.signum = None
        self.stopped = False

    def __enter__(self):
        self.pid = os.getpid()
        self.before = {signum: signal.signal(signum, self.note) for signum in SIGNALS}
        return self

    def __exit__(self, *raised):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def note(self, signum: int, frame) -> None:
        if os.getpid() != self.pid:
            return  # a process that reads data: this one ends it
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            # Not print, which a signal may have interrupted.
            os.write(2, b"\nfinishing the step to save a checkpoint; Ctrl-C again stops at once\n")
        elif signum == signal.SIGINT and time.monotonic() - self.since > SAME_SIGNAL:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        if not self.stopped and self.asked(args):
            self.stopped = True
            args.save_only_model = False
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        elif self.stopped:
            # At the end of the epoch that was left: all is saved.
            control.should_save = control.should_evaluate = False

    on_evaluate = on_epoch_end = on_step_end

    def asked(self, args) -> bool:
        """Whether a signal came to any process."""
        if args.world_size == 1:
            return self.signum is not None
        signum = reduce(torch.tensor(self.signum or 0, device=args.device), "sum").item()
        if signum and self.signum is None:
            self.signum = signal.SIGTERM
        return signum > 0


def resume_command(processes: int) -> str:
    """The command of this process, to go on from its last checkpoint."""
    launch = ["python"] if processes == 1 else ["accelerate", "launch", "..."]
    return shlex.join([*launch, *sys.argv, "--resume_from_checkpoint", "last"])


def ignore_signals() -> None:
    """In a process that reads data: go on for the step that the training finishes. It ends with the training.

    Terminals and schedulers send signals to all processes.
    """
    if torch.utils.data.get_worker_info() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, ignore_once)


def ignore_once(signum: int, frame) -> None:
    signal.signal(signum, signal.SIG_DFL)
