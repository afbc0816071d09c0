#!/usr/bin/env bash
# The same command on every machine, with its own NODE_RANK (0, 1, ...); all must reach MASTER_ADDR.
#   MASTER_ADDR=10.0.0.1 NODES=4 NODE_RANK=0 scripts/accelerate/multi_node.sh vit_l16 --train_data 's3://bucket/{00000..09999}.tar'
# Data must be readable from all machines under the same name; OUTPUT must be on storage that all share.
set -euo pipefail
exec accelerate launch \
    --config_file "${CONFIG:-scripts/accelerate/ddp.yaml}" \
    --num_machines "$NODES" --machine_rank "$NODE_RANK" \
    --num_processes "$((NODES * ${GPUS:-8}))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}" \
    --rdzv_backend c10d \
    scripts/pretrain.py "$@"
