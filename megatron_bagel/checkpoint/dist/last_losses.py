# SPDX-License-Identifier: Apache-2.0
"""The losses of a checkpoint's last step, from the metrics file of its run, where that file still lies beside the checkpoints."""

from __future__ import annotations

import logging

from megatron_bagel.checkpoint.dist.stored_run import RUN_ID
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.common.json_files import whole_lines

logger = logging.getLogger(__name__)

_LOSSES = ("loss", "ce", "mse")


def last_losses(checkpoint: CheckpointWeights) -> dict[str, float]:
    """Return ``loss``, ``ce`` and ``mse`` of the step that ``checkpoint`` ends with; empty if its run's ``metrics.jsonl`` is not there."""
    path = checkpoint.folder.resolve().parent.parent / "metrics.jsonl"
    if not path.is_file():
        return {}
    run_id = checkpoint.state["run"].get(RUN_ID)
    losses: dict[str, float] = {}
    try:
        for _, record in whole_lines(path, "the model card is written without losses"):
            # Metrics number steps from 0; a checkpoint counts the steps that are done.
            if record.get("step") == checkpoint.step - 1 and record.get("run", run_id) == run_id:
                losses = {name: record[name] for name in _LOSSES if isinstance(record.get(name), float)}
    except (ValueError, OSError) as error:
        logger.info("%s", error)
    return losses
