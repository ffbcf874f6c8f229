"""What a user can mend: shown as one line, without a traceback."""


class UserError(Exception):
    """A mistake or a circumstance the user can mend; the message is one line."""
