# SPDX-License-Identifier: Apache-2.0
"""The image encoder: SigLIP NaViT with its connector, and the FLUX autoencoder."""
