"""The one exception for what a user can put right."""


class VitdemoError(Exception):
    """Bad input. The message is one line: what is wrong, the file's or option's name, what to do.

    The command line prints it as it is and ends with exit code 2.
    """
