#!/bin/sh
# One host: as many ranks as it has GPUs, or one per core without GPUs.
#
# Change: nothing, or give RANKS=4 (ranks on this host), RESTARTS=3 (how often all ranks start again after one has
# died; the script must go on from its last checkpoint).
#
#     launch/torchrun.sh examples/train.py --epochs 3
#     RANKS=4 RESTARTS=3 launch/torchrun.sh examples/train.py --checkpoint out/train.pt
set -eu

if [ $# -eq 0 ]; then
    echo "usage: [RANKS=n] [RESTARTS=n] $0 script.py [arguments]" >&2
    exit 2
fi
python="$(sh "$(dirname "$0")/python.sh")"
exec "$python" -m syncbn.launch -n "${RANKS:-auto}" --max-restarts "${RESTARTS:-0}" "$@"
