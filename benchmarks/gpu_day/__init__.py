# SPDX-License-Identifier: Apache-2.0
"""Everything that wants one GPU, in one command that makes the most of a short loan."""
