#!/usr/bin/env bash
# Train on several machines: the same command on each of them, with its own NODE_RANK from 0.
#   bash configs/torchrun_nodes.sh NODES NODE_RANK FIRST_HOST DEVICES FLAGFILE [--more.flags ...]
# FIRST_HOST is the machine of NODE_RANK 0, reachable on PORT (default 29500); --run.workdir and --data.path must lie on a
# file system that all of them share. A run that was stopped goes on with the same command.
set -euo pipefail
if [ $# -lt 5 ]; then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
nodes=$1 rank=$2 host=$3 devices=$4 flagfile=$5
shift 5
cd "$(dirname "$0")/.."
# A signal to stop reaches every process, and the save that it asks for may take minutes. The run warns where it takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --nnodes="$nodes" --node_rank="$rank" --nproc_per_node="$devices" \
    --master_addr="$host" --master_port="${PORT:-29500}" train.py --flagfile="$flagfile" "$@"
