#!/bin/bash
#SBATCH --job-name=moco-v2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# On 4 machines of 8 GPUs, into the folder of the job's name in runs/, on a file system that all machines share (instead
# of --out, which this script gives itself). Each experiment wants a name of its own: what its folder holds is gone on
# with.
#
#   sbatch --job-name v2 docs/slurm.sh --preset moco-v2 --data imagenet/ --batch-size 1024
#
# Two minutes before the time is up every process gets SIGTERM, saves after the same step and ends. Submitted again,
# the job continues from there; submitted several times with "sbatch --dependency=singleton", one after another.

OUT=runs/$SLURM_JOB_NAME
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over by itself
if [ -e "$OUT/checkpoint.pth" ]; then
    set -- --resume "$OUT"
else
    set -- --out "$OUT" "$@"
fi
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m moco_fast.cli pretrain "$@"
