# SPDX-License-Identifier: Apache-2.0
"""From nothing to a small trained model in minutes: the stages of ``megatron-bagel quickstart``, their progress, and the last page."""
