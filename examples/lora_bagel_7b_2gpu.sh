#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains adapters of the released BAGEL-7B-MoT on two GPUs of 80 GB, as examples/lora_bagel_7b_1gpu.sh does on one.
#
#   model_path=hf/BAGEL-7B-MoT dataset_config_file=data.yaml bash examples/lora_bagel_7b_2gpu.sh [flags of megatron_bagel.train]
#
# Each GPU has all weights and packs of its own: adapters are small, so their gradients are exchanged in no time, and tensor parallelism would
# exchange activations instead. For GPUs of 40 GB add --tensor_model_parallel_size 2 --sequence_parallel. Not yet run on a GPU.
set -euo pipefail
export nproc_per_node=${nproc_per_node:-2} gradient_accumulation_steps=${gradient_accumulation_steps:-2}
exec bash "$(dirname "${BASH_SOURCE[0]}")/lora_bagel_7b_1gpu.sh" "$@"
