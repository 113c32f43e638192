"""The exceptions that are meant for people."""


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one line that says what is wrong, where, and what to do
    about it. The command line prints it without a traceback and exits with 2;
    library users may catch it as a `ValueError`.
    """

    exit_code = 2


class NotYet(UserError):
    """It may work a little later: other machines are not there yet.

    The command line exits with 75, EX_TEMPFAIL of sysexits.h, so that launchers try again.
    """

    exit_code = 75
