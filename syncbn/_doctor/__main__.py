"""``python -m syncbn._doctor``: one rank of a trial, or the look at the accelerators.

That happens in a process of its own because a broken driver may hang or abort the process that asks it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn._doctor import looking, trial
from syncbn._doctor.processes import GRACE
from syncbn._doctor.words import one_line


def main(arguments: Sequence[str]) -> int:
    """``rank FOLDER BACKEND SECONDS`` or ``devices FOLDER``: leave a report in the folder."""
    job, folder, *rest = arguments
    report: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0"))}
    try:
        if job == "devices":
            report |= looking.accelerators()
        else:
            # Also where Python code cannot run any more, within a call that never returns.
            faulthandler.dump_traceback_later(float(rest[1]) + GRACE, exit=True)
            report |= trial.rank_of_trial(Path(folder), rest[0], float(rest[1]))
    except Exception as error:
        traceback.print_exc()
        report |= {"problem": one_line(error), "time": time.time()}
    partial = Path(folder, f"partial-{report['rank']}")
    partial.write_text(json.dumps(report))
    partial.rename(Path(folder, f"report-{report['rank']}.json"))
    return 1 if "problem" in report else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
