# SPDX-License-Identifier: Apache-2.0
"""The console commands. They parse flags, resolve a run once, and hand settings to the rooms below."""

from megatron_bagel.cli.console import quiet

quiet()  # before the commands import torch
