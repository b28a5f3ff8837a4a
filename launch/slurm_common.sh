# shellcheck shell=bash
# What the sbatch files share. They source it in the repository's folder.

# torchrun would choose 1 and warn about it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Run a command once on each node, inside CONTAINER_IMAGE if that is set (needs pyxis and enroot).
run_on_nodes() {
    local container=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        container=(
            --container-image="$CONTAINER_IMAGE"
            --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
            --container-workdir="$PWD"
        )
    fi
    # ALL is what sbatch let through: the list in --export. Without --cpu-bind=none, SLURM may bind
    # the one task of a node, and with it all ranks there, to a single core.
    srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" "$@"
}

# Run a Python module on all GPUs of the job, one rank each; the first node hosts the rendezvous.
run_module() {
    local address port=$((20000 + SLURM_JOB_ID % 10000))
    # The address by which SLURM itself reaches the node, so that no name has to be resolved.
    address=$(scontrol show node "$SLURMD_NODENAME" | grep -oP 'NodeAddr=\K\S+')
    # SLURM sends SIGTERM to all processes of a job that it preempts. The launcher leaves its ranks
    # the whole GraceTime for their step and checkpoint; torchrun would kill them 30 s later.
    run_on_nodes python -m trb_megatron.launch \
        --nnodes="$SLURM_NNODES" \
        --nproc-per-node="${SLURM_GPUS_ON_NODE:?the job has no GPUs: give sbatch --gpus-per-node}" \
        --rdzv-backend=c10d \
        --rdzv-endpoint="$address:$port" \
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        -m "$@"
}
