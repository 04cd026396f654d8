# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced by the recipes (pretrain_*.sh, finetune_*.sh): starts training on one node or on several. Not a program of its own.
#
# Variables, as in BAGEL's guide, each with its default:
#   num_nodes (1)  nproc_per_node (8)   nodes, and GPUs of a node
#   master_addr (127.0.0.1)  master_port (29500)   where the nodes meet: any one of them, the same for all
#   node_rank ()     this node's number, 0 to num_nodes - 1. Left empty, nodes find their numbers by torchrun's rendezvous, which can
#                    also start all of them again after one has failed. Given, the command is the guide's.
# Ours:
#   max_restarts (3) how often the ranks are started again after a failure; they go on from the newest checkpoint
#   job_id (bagel)   name of the rendezvous, the same on all nodes and another one for every job that shares master_addr
#   TORCHRUN (torchrun)   the launcher, such as .venv/bin/torchrun
#   DRY_RUN=1        print the command and start nothing

num_nodes=${num_nodes:-1}
nproc_per_node=${nproc_per_node:-8}
master_addr=${master_addr:-127.0.0.1}
master_port=${master_port:-29500}
node_rank=${node_rank:-}
max_restarts=${max_restarts:-3}
job_id=${job_id:-bagel}
TORCHRUN=${TORCHRUN:-torchrun}

# From the checkout as it is, installed or not, whatever folder one stands in.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# Megatron-Core relies on communication being issued before the computation that it overlaps with: one hardware queue keeps that order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Packs differ in shape from step to step; growing segments keep the allocator from leaving holes.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# torchrun would set 1 and say so.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# launch FLAGS...: megatron_bagel.train with FLAGS on every GPU of this node. Returns the launcher's exit status.
launch() {
  local where
  if [[ -n $node_rank ]]; then
    where=("--nnodes=$num_nodes" "--node_rank=$node_rank" "--master_addr=$master_addr" "--master_port=$master_port")
  elif [[ $num_nodes == 1 ]]; then
    where=(--standalone "--max_restarts=$max_restarts")
  else
    where=("--nnodes=$num_nodes" --rdzv_backend=c10d "--rdzv_endpoint=$master_addr:$master_port" "--rdzv_id=$job_id"
      "--max_restarts=$max_restarts")
  fi
  local command=("$TORCHRUN" "${where[@]}" "--nproc_per_node=$nproc_per_node" -m megatron_bagel.train "$@")
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    return
  fi
  run_and_pass_signals_on "${command[@]}"
}

# A scheduler that wants the node back sends SIGTERM or SIGUSR1. It reaches the ranks as SIGUSR1, by which they save and leave; torchrun,
# which would end them after 30 seconds whatever they are writing, does not get it (hence a session of its own).
run_and_pass_signals_on() {
  local launcher status signalled
  setsid "$@" &
  launcher=$!
  trap 'signalled=1; pkill -USR1 -P "$launcher" || true' TERM USR1
  trap 'signalled=1; kill -INT "$launcher"' INT
  while :; do
    signalled=
    status=0
    wait "$launcher" || status=$?
    # A signal ends `wait`, not the launcher.
    if [[ -z $signalled || $status -le 128 ]]; then break; fi
  done
  trap - TERM USR1 INT
  return "$status"
}
