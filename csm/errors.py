"""The one exception that means "what the user gave cannot be used"."""


class InputError(ValueError):
    """Bad input: a file, a value or an address that the user gave.

    The message is one line that says what is wrong, where, and what to do about it; the command line prints it and exits with 2.
    A wrong argument from our own code is a plain ``ValueError``.
    """
