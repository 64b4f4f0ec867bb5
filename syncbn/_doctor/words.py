"""An error, or the end of a process, in one line."""

from __future__ import annotations

import re
from typing import Any


def one_line(error: Any) -> str:
    """An error as one line, without the C++ places that torch adds."""
    text = re.sub(r"\[enforce fail at [^]]*\] ", "", str(error).partition("Exception raised from")[0])
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text[:500]}".removesuffix(": ") if isinstance(error, Exception) else text[:500]


def last_words(output: str) -> str:
    """The line of a process's output that says why it ended: the last error, or else the last line."""
    lines = [
        " ".join(line.split()).removeprefix("syncbn-launch: error: ") for line in output.splitlines() if line.strip()
    ]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:500]
