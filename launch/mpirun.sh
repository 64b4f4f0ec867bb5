#!/bin/sh
# MPI on the hosts of a file: start it once, on one of them; mpiexec reaches the others by ssh (without a password).
#
# Change: HOSTFILE (by default "hostfile" beside this script), RANKS (in all, required), WAIT (seconds to wait for hosts
# that are still starting, by default none). A host file has a host per line; how many ranks it takes is written
# node1:4  for MPICH and  node1 slots=4  for Open MPI.
#
#     RANKS=8 HOSTFILE=~/hosts launch/mpirun.sh examples/train.py --backend mpi4py
#
# All hosts need the same packages, script and data at the same paths. When a rank is killed, mpiexec ends the job:
# restart it by starting it again, from the last checkpoint.
set -eu

HOSTFILE="${HOSTFILE:-$(dirname "$0")/hostfile}"
if [ $# -eq 0 ] || [ -z "${RANKS:-}" ]; then
    echo "usage: RANKS=n [HOSTFILE=path] [WAIT=seconds] $0 script.py [arguments]" >&2
    exit 2
fi
if [ ! -r "$HOSTFILE" ]; then
    echo "$0: no host file $HOSTFILE: one line per host, node1:4 (MPICH) or node1 slots=4 (Open MPI)" >&2
    exit 2
fi
if [ "${WAIT:-0}" -gt 0 ]; then
    end=$(($(date +%s) + WAIT))
    this="$(uname -n)"
    sed 's/#.*//; s/[:[:space:]].*//; /^$/d' "$HOSTFILE" | sort -u | while read -r host; do
        if [ "${host%%.*}" = "${this%%.*}" ]; then
            continue # mpiexec needs no ssh to come here
        fi
        until ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$host" true 2>/dev/null; do
            if [ "$(date +%s)" -ge "$end" ]; then
                echo "$0: host $host does not let ssh in after $WAIT s" >&2
                exit 2
            fi
            sleep 1
        done
    done
fi
python="$(sh "$(dirname "$0")/python.sh")"
exec "$python" -m syncbn.launch --engine mpi -n "$RANKS" --hostfile "$HOSTFILE" "$@"
