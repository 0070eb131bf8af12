#!/usr/bin/env bash
# Evaluate a config's student on several GPUs.
set -euo pipefail

usage() {
    cat <<'END'
usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]

example: tools/dist_test.sh configs/mskd_r34_r18_imagenet.py work_dirs/mskd_r34_r18_imagenet/epoch_100.pth 8
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected CONFIG, CHECKPOINT and GPUS (a positive number), but got: $*" >&2
    usage >&2
    exit 2
fi
exec "$(dirname "$0")/torchrun.sh" "$3" "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
