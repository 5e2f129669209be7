"""The errors a user can cause or must see; the command line turns them into exit codes without a traceback."""


class UserError(Exception):
    """The user's input cannot be used (exit code 2): what was got, what was expected, how to fix it."""

    exit_code = 2


class GuardStop(Exception):
    """A guard stopped a run that had gone wrong, with the last good state saved (exit code 3)."""

    exit_code = 3
