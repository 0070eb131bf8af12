#!/usr/bin/env bash
# Train a config under Slurm.
set -euo pipefail

usage() {
    cat <<'END'
usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG GPUS [options of tools/train.py]

GPUS_PER_NODE (default: GPUS, at most 8), CPUS_PER_TASK (default 14) and SRUN_ARGS are read from the environment.

example: GPUS_PER_NODE=8 tools/slurm_train.sh gpu mskd configs/mskd_r34_r18_imagenet.py 16 --amp \
         --cfg-options train_dataloader.batch_size=16
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ $# -lt 4 || ! $4 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected PARTITION, JOB_NAME, CONFIG and GPUS (a positive number), but got: $*" >&2
    usage >&2
    exit 2
fi
gpus=$4
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086  # SRUN_ARGS holds several words
exec srun --partition="$1" --job-name="$2" --gres=gpu:"$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-14}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" --launcher slurm "${@:5}"
