"""The version of the distribution, which both packages show."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qwen-circuits")
except PackageNotFoundError:  # the sources are on the path, and nothing is installed
    __version__ = "0+unknown"
