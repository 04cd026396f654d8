# SPDX-License-Identifier: Apache-2.0
"""Views of an index and of a pack for people."""
