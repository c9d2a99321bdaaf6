#!/bin/bash
#SBATCH --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --signal TERM@300
# Two machines of eight GPUs: sbatch recipes/slurm.sh. The folder of the run is on a disk that both
# see. Five minutes before the job's end the run writes a checkpoint; the next job resumes from it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:29500" \
    ppo.py --zero 3 --out /shared/run --resume
