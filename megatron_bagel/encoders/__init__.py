"""The pre-pipeline stage: SigLIP NaViT with its connector, and the FLUX autoencoder."""
