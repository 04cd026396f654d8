"""The commands of ``megatron-bagel convert``: between training checkpoints and model folders."""
