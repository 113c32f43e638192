"""The one exception that is meant for people."""


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one line that says what is wrong, where, and what to do
    about it. The command line prints it without a traceback and exits with 2;
    library users may catch it as a `ValueError`.
    """
