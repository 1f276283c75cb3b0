"""Reports that are rewritten as work goes on, and gone on with after a cut. Knows nothing of what they report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import DataError
from runtime.files import write_atomic


def write_report(report: Path, contents: Mapping[str, Any]) -> None:
    """Put the report in the place of the last one."""
    write_atomic(report, (json.dumps(contents, indent=1) + "\n").encode())


def earlier_entries(report: Path, entries: str, conditions: Mapping[str, Any], *, under: str = "") -> list[Any]:
    """What an earlier, cut-off run of the same conditions found; nothing where there is no report yet.

    Args:
        entries: the key of the list of what was found.
        under: the key that the conditions stand under; at the top where empty.

    Raises:
        DataError: the file is no such report, or of other conditions.
    """
    if not report.exists():
        return []
    try:
        contents = json.loads(report.read_text(encoding="utf-8"))
        held, done = (contents[under] if under else contents), list(contents[entries])
        # As JSON has it: a tuple comes back as a list.
        wanted = json.loads(json.dumps(conditions))
        differing = sorted(key for key in wanted if held.get(key) != wanted[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{report} is not a report of this kind: remove it, or run without --resume") from error
    if differing:
        raise DataError(f"{report} is of another run ({', '.join(differing)} differ): run without --resume")
    return done
