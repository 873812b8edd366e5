"""What the reports for a terminal share: their width, their tables' line, and how they become plain text."""

from __future__ import annotations

import io
import sys

from rich import box
from rich.console import Console, RenderableType

WIDTH = 80
LINES = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one line under the header


def plain(report: RenderableType, width: int = WIDTH) -> str:
    """A report without colours and control codes, in lines of `width` at most, and only what stdout can encode."""
    written = io.StringIO()
    Console(file=written, width=width, color_system=None, force_terminal=False, legacy_windows=False).print(report)
    lines = "\n".join(line.rstrip() for line in written.getvalue().splitlines())
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return lines.encode(encoding, "backslashreplace").decode(encoding)
