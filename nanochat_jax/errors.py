"""The one exception that users are meant to read."""


class UserError(Exception):
    """Something outside the program is wrong: the message names what, where, and the remedy.

    Command lines print the message without a traceback and exit with status 2; everything else that is
    raised is a bug of ours and keeps its traceback.
    """
