"""Select, while a model trains, which samples of several unequal sources are worth training on."""

from lightning_dvc.version import __version__

__all__ = ["__version__"]
