# SPDX-License-Identifier: Apache-2.0
"""Records goldens from a checkout of the original BAGEL: ``python -m tools.record_goldens --help``."""
