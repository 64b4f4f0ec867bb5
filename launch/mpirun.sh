#!/bin/sh
# MPI on the hosts of a file: start it once, on one of them; mpiexec reaches the others by ssh (without a password).
#
# Change: HOSTFILE (by default "hostfile" beside this script), RANKS (in all, required). A host file has a host per
# line; how many ranks it takes is written  node1:4  for MPICH and  node1 slots=4  for Open MPI.
#
#     RANKS=8 HOSTFILE=~/hosts launch/mpirun.sh examples/train.py --backend mpi4py
#
# All hosts need the same packages, script and data at the same paths. When a rank is killed, mpiexec ends the job:
# restart it by starting it again, from the last checkpoint.
set -eu

HOSTFILE="${HOSTFILE:-$(dirname "$0")/hostfile}"
if [ $# -eq 0 ] || [ -z "${RANKS:-}" ]; then
    echo "usage: RANKS=n [HOSTFILE=path] $0 script.py [arguments]" >&2
    exit 2
fi
if [ ! -r "$HOSTFILE" ]; then
    echo "$0: no host file $HOSTFILE: one line per host, node1:4 (MPICH) or node1 slots=4 (Open MPI)" >&2
    exit 2
fi
exec "${PYTHON:-python3}" -m syncbn.launch --engine mpi -n "$RANKS" --hostfile "$HOSTFILE" "$@"
