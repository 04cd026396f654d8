"""The commands of ``megatron-bagel data``: they build, merge, verify and show an index, and make sample data, latents, tokenizers."""
