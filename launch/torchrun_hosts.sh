#!/bin/sh
# Several hosts with torchrun: run this very command on each of them, within ten minutes of each other.
#
# Change: HOSTS (how many), MEET (name or address of one of the hosts, with a port that is free and open there), RANKS
# (per host; by default one per GPU, or one per core without GPUs), IFACE (network interface for gloo, if a host's name
# does not lead to the address by which the others reach it), JOB (a name, where jobs share a MEET).
#
#     HOSTS=2 MEET=node1:29400 launch/torchrun_hosts.sh examples/train.py --epochs 3
#
# All hosts need the same script, packages and data at the same paths. Try it first with --check instead of the script.
set -eu

if [ $# -eq 0 ] || [ -z "${HOSTS:-}" ] || [ -z "${MEET:-}" ]; then
    echo "usage: HOSTS=n MEET=host:port [RANKS=n] [IFACE=eth0] [RESTARTS=n] [JOB=name] $0 script.py [arguments]" >&2
    exit 2
fi
if [ -n "${IFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="$IFACE" NCCL_SOCKET_IFNAME="$IFACE"
fi
python="$(sh "$(dirname "$0")/python.sh")"
exec "$python" -m syncbn.launch -n "${RANKS:-auto}" \
    --nnodes "$HOSTS" --rdzv-backend c10d --rdzv-endpoint "$MEET" --rdzv-id "${JOB:-syncbn}" \
    --max-restarts "${RESTARTS:-0}" "$@"
