"""The exceptions that the library raises on purpose.

Every message says what was expected, what came, and what to do. All of them derive from
:class:`DVCError`, so one ``except`` clause separates our refusals from somebody else's bugs.
"""

from numbers import Integral, Real


class DVCError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigurationError(DVCError, ValueError):
    """A setting that cannot work, reported before training starts."""


class ObjectiveError(DVCError, RuntimeError):
    """Per-sample losses and outputs of the user's model could not be obtained."""


class UnevenError(ObjectiveError):
    """A batch came out without losses, or with other than one or more for each of its samples."""


class CaptureError(DVCError, RuntimeError):
    """A layer's activations or gradients could not be captured."""


class BadSampleError(DVCError, RuntimeError):
    """A sample failed while it was being scored and ``on_bad_sample="raise"`` was set."""


class StateError(DVCError, RuntimeError):
    """A checkpoint or a saved selection does not fit the objects it is loaded into."""


class ProcessError(DVCError, RuntimeError):
    """Another process failed while all worked on one round."""


def is_whole(value: object, least: int) -> bool:
    """Whether a setting is a whole number, also one of numpy's, and at least so large.

    Example:
        >>> is_whole(3, least=1), is_whole(3.0, least=1), is_whole(True, least=1)
        (True, False, False)
    """
    return is_number(value) and isinstance(value, Integral) and int(value) >= least


def is_number(value: object) -> bool:
    """Whether a setting is a number, also one of numpy's, so that it can be compared.

    Example:
        >>> is_number(0.5), is_number(3), is_number("3"), is_number(True)
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


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
