# SPDX-License-Identifier: Apache-2.0
"""From files on disk or in an object store to records."""
