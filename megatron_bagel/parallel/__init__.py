# SPDX-License-Identifier: Apache-2.0
"""Process groups and autograd-aware collectives: what moves between ranks, knowing no model."""
