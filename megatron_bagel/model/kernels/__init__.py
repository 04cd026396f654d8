# SPDX-License-Identifier: Apache-2.0
"""The elementwise kernels of a decoder layer, in one interface with several implementations (``--fused_kernels``)."""
