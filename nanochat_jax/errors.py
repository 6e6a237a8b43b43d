"""The two exceptions that users are meant to read."""

import signal


class UserError(Exception):
    """Something outside the program is wrong: the message names what, where, and the remedy.

    Command lines print the message without a traceback and exit with status 2; everything else that is
    raised is a bug of ours and keeps its traceback.
    """


class Stopped(Exception):
    """A signal asked a run to stop, and everything is saved."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step:,}; all is saved")
        self.exit_code = 128 + signal_number
