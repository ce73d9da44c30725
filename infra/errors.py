"""Errors of the user's data, which end a run with one line."""


class DataError(ValueError):
    """A record or medium that cannot be used: names the file, the record, what was found and what was expected."""


class ModelError(ValueError):
    """A checkpoint that cannot be used, and why."""


class VideoError(ValueError):
    """A video or image that cannot be used, and why."""
