#!/usr/bin/env bash
# Train on the devices of this machine, a process for each:
#   bash configs/torchrun_one_node.sh DEVICES FLAGFILE [--more.flags ...]
# A run that was stopped goes on with the same command.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,4p' "$0" >&2
    exit 2
fi
devices=$1 flagfile=$2
shift 2
cd "$(dirname "$0")/.."
# A signal to stop reaches every process, and the save that it asks for may take minutes. The run warns where it takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --standalone --nproc_per_node="$devices" train.py --flagfile="$flagfile" "$@"
