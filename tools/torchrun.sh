#!/usr/bin/env bash
# Start processes of a tool on this machine, or on several (used by dist_train.sh and dist_test.sh).
set -euo pipefail

usage() {
    cat <<'END'
usage: tools/torchrun.sh PROCESSES SCRIPT [arguments of SCRIPT]

NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT as torch.distributed.run knows them; one node by default.

example: tools/torchrun.sh 8 tools/benchmark_step.py configs/mskd_r34_r18_imagenet.py --amp
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected PROCESSES (a positive number) and SCRIPT, but got: $*" >&2
    usage >&2
    exit 2
fi
if [[ ${NNODES:-1} == 1 ]]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK}"
                --master_addr "${MASTER_ADDR:?set MASTER_ADDR}" --master_port "${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$1" "${@:2}"
