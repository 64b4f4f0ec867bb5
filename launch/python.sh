#!/bin/sh
# Which Python the recipes beside this file run: prints its path, or one line that says what to do.
#
# PYTHON=/path/to/python goes first. Then come the active environment, the checkout's .venv, and the environment into
# which a wheel has put this folder.
set -eu

here="$(cd "$(dirname "$0")" && pwd)"

can() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("syncbn") and u.find_spec("torch")))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if can "$PYTHON"; then
        echo "$PYTHON"
        exit
    fi
    echo "launch: PYTHON=$PYTHON cannot run syncbn and torch: install both there (pip install .), or name another" >&2
    exit 2
fi
for candidate in python3 python "$here/../.venv/bin/python" "$here/../../../bin/python3"; do
    if can "$candidate"; then
        echo "$candidate"
        exit
    fi
done
echo "launch: no Python here has syncbn and torch: run 'make venv' in the checkout, activate your environment," \
    "or give PYTHON=/path/to/python" >&2
exit 2
