"""Errors of the user's files. They end a run with one line, without a traceback."""


class DataError(ValueError):
    """A record or medium that cannot be used. Names file, record, found and expected."""


class ModelError(ValueError):
    """A checkpoint that cannot be used, and why."""


class VideoError(ValueError):
    """A video or image that cannot be used, and why."""
