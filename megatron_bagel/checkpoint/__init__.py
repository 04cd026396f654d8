# SPDX-License-Identifier: Apache-2.0
"""Training state on disk, and the weight map to and from Hugging Face folders."""
