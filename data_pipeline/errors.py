"""The error of this package that is meant for users."""


class DatasetError(ValueError):
    """A data set that cannot be used as it is; the message is one line for the user."""
