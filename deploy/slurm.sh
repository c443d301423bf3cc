#!/usr/bin/env bash
# One study on whole nodes of a Slurm cluster; sbatch it again, with RESUME=--resume, to go on.
#   sbatch --nodes=8 deploy/slurm.sh
#SBATCH --job-name=ekd-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
SHARED=${SHARED:-$PWD/runs}            # seen by all nodes: the study
LOCAL=${LOCAL:-${TMPDIR:-/var/tmp}}    # of each node: the teacher's logits, decoded images
CPUS=${SLURM_CPUS_ON_NODE:?}
GPUS=${SLURM_GPUS_ON_NODE:-0}

export EKD_CACHE_DIR=$LOCAL/ekd_ray
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1   # a tenth off a step on CPUs
export EKD_DATA_ROOT=${EKD_DATA_ROOT:?set it to the data sets, as every node sees them}
# Anybody on the network could run code on a cluster without a token.
export RAY_AUTH_MODE=token
umask 077
test -f "$HOME/.ray/auth_token" || ray get-auth-token --generate > /dev/null

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):6379

# Starts Ray on every node, runs the command on the first, and stops Ray when it has ended.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" \
    --num-cpus="$CPUS" --num-gpus="$GPUS" -- \
    ekd-ray tune --address auto \
    --dataset cifar100 --pair resnet32x4-resnet8x4 \
    --teacher-weights "$SHARED/teachers/resnet32x4.pth" \
    --trials 256 --gpus-per-trial 0.25 --cpus-per-trial 1 \
    --out "$SHARED/r32x4-r8x4" ${RESUME:-}
