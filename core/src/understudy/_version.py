"""The version of the distribution, where the command line can read it without looking for metadata."""

__version__ = "0.1.0"
