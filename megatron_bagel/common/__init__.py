# SPDX-License-Identifier: Apache-2.0
"""Small helpers that know nothing of models or training: files, lists in sentences, assignment by size."""
