"""The only place that knows CUDA from CPU, and one Megatron-Core release from another."""
