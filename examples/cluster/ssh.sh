#!/bin/bash
# ./ssh.sh HOST1 HOST2 ...: one run on machines that share a folder, without a scheduler.
# The first host holds the meeting point. Ctrl-C stops all machines, and the same command resumes the run.
set -u
FOLDER=${FOLDER:-$PWD}     # the same path on all machines
RUN=${RUN:-runs/church}
EACH=${EACH:-8}            # processes of a machine: its number of GPUs
PORT=${PORT:-29500}
SSH=${SSH:-ssh -tt}        # -tt: a machine whose connection ends gets SIGHUP, and the run saves
ID=$(date +%s)

one() {
  $SSH "$1" "cd '$FOLDER' && exec torchrun --nnodes $COUNT --nproc-per-node $EACH --rdzv-backend c10d \
    --rdzv-endpoint $HEAD:$PORT --rdzv-id $ID --max-restarts 3 \
    -m ddpm train ${PRESET:-lsun_church} --data ${DATA:-/data/church} --out $RUN ${OPTIONS:-}"
}

HEAD=$1 COUNT=$#
pids=()
trap 'kill -TERM "${pids[@]}"' INT TERM
for host; do one "$host" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
