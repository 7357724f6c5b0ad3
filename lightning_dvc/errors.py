"""The exceptions that the library raises on purpose.

Every message says what was expected, what came, and what to do. All of them derive from
:class:`DVCError`, so one ``except`` clause separates our refusals from somebody else's bugs.
"""


class DVCError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigurationError(DVCError, ValueError):
    """A setting that cannot work, reported before training starts."""


class ObjectiveError(DVCError, RuntimeError):
    """Per-sample losses and outputs of the user's model could not be obtained."""


class UnevenError(ObjectiveError):
    """A batch came out with other than a loss, or as many losses, for each of its samples."""


class CaptureError(DVCError, RuntimeError):
    """A layer's activations or gradients could not be captured."""


class BadSampleError(DVCError, RuntimeError):
    """A sample failed while it was being scored and ``on_bad_sample="raise"`` was set."""


class StateError(DVCError, RuntimeError):
    """A checkpoint or a saved selection does not fit the objects it is loaded into."""


class ProcessError(DVCError, RuntimeError):
    """Another process failed while all worked on one round."""


def check_settings(*checks: tuple[str, object, bool, str]) -> None:
    """Refuse the first setting that is out of its range.

    Args:
        checks: Name, value, whether it fits, and the range in words, of each setting.

    Raises:
        ConfigurationError: If one does not fit.

    Example:
        >>> check_settings(("rounds", 0, False, "at least 1"))
        Traceback (most recent call last):
        ...
        lightning_dvc.errors.ConfigurationError: rounds must be at least 1, but is 0; change rounds
    """
    for name, value, fits, allowed in checks:
        if not fits:
            raise ConfigurationError(f"{name} must be {allowed}, but is {value!r}; change {name}")
