#!/usr/bin/env bash
# Train a config on several GPUs of one node, or of several nodes (see --help). Without a GPU the processes run on CPU.
set -euo pipefail

usage() {
    cat <<'END'
usage: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]

Starts GPUS processes on this machine, one per GPU; without a GPU they run on the CPU (gloo).
Several nodes: run it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.

example: tools/dist_train.sh configs/mskd_r34_r18_imagenet.py 8 --amp --cfg-options train_dataloader.batch_size=32
example: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 \
         tools/dist_train.sh configs/mskd_r34_r18_imagenet.py 8 --amp --cfg-options train_dataloader.batch_size=16
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected CONFIG and GPUS (a positive number), but got: $*" >&2
    usage >&2
    exit 2
fi
exec "$(dirname "$0")/torchrun.sh" "$2" "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
