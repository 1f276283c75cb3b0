"""What transformers calls for `model.generate(..., custom_generate="THIS_ADAPTER")`: SpecBound, on a plain model.

The work is done by the package `specbound`, whose module is named `runtime`. It is imported inside a `try`, where
transformers does not look: it would take the module's name for a package to install, and PyPI's is another project.
"""

import sys


def generate(model, **arguments):
    """Tokens of plain `generate`, from this adapter; arguments and result are those of `model.generate`."""
    try:
        from runtime.custom_generate import generate_with
    except ImportError as error:
        raise ImportError(
            "this adapter needs the package specbound: run `pip install specbound`"
            f" (not a package of the name `runtime`, which is another project's); {error}"
        ) from error
    # transformers hands over every argument but this one, and runs a copy of this file from a folder of its own.
    adapter = sys._getframe(1).f_locals.get("custom_generate")
    return generate_with(adapter, model, arguments)
