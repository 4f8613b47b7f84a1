#!/bin/bash
# sbatch slurm.sh: one run on several nodes. Each restart resumes the run from its newest checkpoint.
#SBATCH --job-name=ddpm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ddpm-%j.log
#SBATCH --signal=B:USR1@300
# One task a node: torchrun starts a process for each GPU. --requeue lets Slurm start the job again after a preemption
# or the loss of a node. Options of sbatch replace those above. USR1 comes to this script 300 s before the time limit.

RUN=${RUN:-runs/church}                # a folder that all nodes see
HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node need different ports
GPUS=${SLURM_GPUS_ON_NODE:-1}

# Slurm sends TERM when it requeues or cancels the job, and then decides alone whether the job starts again.
trap 'by_slurm=1' TERM
# The time ends: ask the ranks to save and to stop. They leave the marker RUN/preempted.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1

rm -f "$RUN/preempted"
# Since Slurm 22.05, srun does not take --cpus-per-task from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --max-restarts 3 \
  -m ddpm train ${PRESET:-lsun_church} --data "${DATA:-/data/church}" --out "$RUN" ${OPTIONS:-} &
while wait $!; code=$?; [ $code -gt 128 ] && kill -0 $! 2>/dev/null; do :; done # a trap interrupts `wait`

# A run that was stopped and saved begins again in this job. A run that failed does not.
if [ -e "$RUN/preempted" ] && [ -z "${by_slurm:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
