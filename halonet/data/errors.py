"""The error of a data set that is missing, damaged or not what the run expects."""


class DataError(ValueError):
    """The data, not the configuration, is at fault; the message is one line.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 3


class NotPreparedError(DataError):
    """A data set of TFDS that is not there, or only half."""


class DamagedShardError(DataError):
    """A file of a prepared data set of TFDS is missing or cannot be read."""


class DamagedImageError(DataError):
    """The bytes of one example are no image that can be read; the message names it."""
