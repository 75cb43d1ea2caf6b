"""The version, apart from everything that has to be installed to be imported."""

__version__ = "0.1.0"
