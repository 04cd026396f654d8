# SPDX-License-Identifier: Apache-2.0
"""Names of floating-point types, as flags and files spell them."""

from __future__ import annotations

import torch

#: Short names, of flags.
SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: torch's own names, of files.
LONG = {"float32": torch.float32, "bfloat16": torch.bfloat16}
