# SPDX-License-Identifier: Apache-2.0
"""Processes and process groups: how ranks start, find each other and end."""
