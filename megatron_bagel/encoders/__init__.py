"""The image encoder: SigLIP NaViT with its connector, and the FLUX autoencoder."""
