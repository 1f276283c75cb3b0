"""The errors SpecBound raises. Knows nothing of models, files or the network.

Each error is also the standard-library error it stands for, so that callers who do not know this package can
catch it. A message is one line: what was given, what was expected, what to do next.

* SpecBoundError
    * ConfigError (ValueError): a setting, a recipe or an argument
    * DataError (ValueError): prompts, corpus, calibration text
    * AdapterError (OSError): a folder or repository that is not a whole and valid adapter
    * BaseModelMismatch (ValueError): an adapter fitted on another base or tokenizer
    * UnsupportedModel (NotImplementedError): a base whose layers cannot be driven one by one
"""


class SpecBoundError(Exception):
    """Root of all errors raised on purpose by SpecBound."""


class ConfigError(SpecBoundError, ValueError):
    """A setting, a recipe or an argument is wrong."""


class DataError(SpecBoundError, ValueError):
    """Prompts, a corpus or calibration text cannot be used."""


class AdapterError(SpecBoundError, OSError):
    """A folder or repository is not a whole and valid adapter."""


class BaseModelMismatch(SpecBoundError, ValueError):
    """The adapter was fitted on another base model or tokenizer."""


class UnsupportedModel(SpecBoundError, NotImplementedError):
    """The base model's layers cannot be driven one by one."""


def one_line(error: object) -> str:
    """The first line of what an error or a warning says; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
