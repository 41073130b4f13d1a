#!/bin/bash
#SBATCH --job-name=moco
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# MoCo v2 on 4 machines of 8 GPUs: sbatch docs/slurm.sh. Two minutes before the time is up every process gets SIGTERM, saves
# after the same step and ends; submitted again, the job goes on from there.

export OUT=runs/v2 # on a file system that all machines share
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -e "$OUT/checkpoint.pth" ]; then
    RUN="--resume $OUT"
else
    RUN="--out $OUT --preset moco-v2 --data imagenet/ --batch-size 1024"
fi

# shellcheck disable=SC2086 # RUN is several words
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m moco_fast.cli pretrain $RUN
