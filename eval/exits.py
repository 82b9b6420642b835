"""Commands end with one line and exit code 2 where their input is wrong, not with a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def exit_code(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> int:
    """Run `main`: 0, or 2 for a ValueError or OSError, whose message goes to stderr as one line. Other errors are raised."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
