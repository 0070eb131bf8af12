#!/usr/bin/env bash
# usage: tools/torchrun.sh PROCESSES SCRIPT [arguments]   (used by dist_train.sh and dist_test.sh)
# NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT as torch.distributed.run knows them; one node by default.
set -euo pipefail

if [[ ${NNODES:-1} == 1 ]]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK}"
                --master_addr "${MASTER_ADDR:?set MASTER_ADDR}" --master_port "${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$1" "${@:2}"
