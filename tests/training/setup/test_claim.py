# SPDX-License-Identifier: Apache-2.0
"""Which run a start belongs to: an earlier run in its folders is continued, moved aside, or the start is refused. Nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bagel.assembly.starting_weights import InitialSettings, StartSettings, weight_source
from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.training.resilience.run_identity import RUN_FILE, RunIdentity
from megatron_bagel.training.setup.claim import Claim, RefusedFolders, claim_folders


def saved(directory: Path, step: int, run_id: str = "", **run_state: object) -> Path:
    """A published checkpoint without tensors; ``run_state`` replaces what a run would have stored."""
    folder = step_folders.begin(directory, step, run_id)
    for name in ("metadata.json", ".metadata"):
        (folder / name).write_text("{}")
    stored = run_state or {"schedule": {"step": step}, **({"run_id": run_id} if run_id else {})}
    (folder / step_folders.STATE_FILE).write_text(json.dumps({"format_version": 1, "run": stored}))
    return step_folders.publish(folder)


def logged(results: Path, *steps: int) -> None:
    """Records of steps in metrics.jsonl."""
    results.mkdir(exist_ok=True)
    (results / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def start(folder: Path, **changes: object) -> StartSettings:
    """Settings of a start in ``folder``/checkpoints that continues nothing."""
    initial = InitialSettings(1, None, None)
    settings = StartSettings(folder / "checkpoints", False, None, False, False, True, initial)
    return replace(settings, **changes)  # type: ignore[arg-type]


def claim(folder: Path, **changes: object) -> Claim:
    return claim_folders(start(folder, **changes), folder / "results")


def run_of(folder: Path) -> set[str]:
    """The identities that both folders name."""
    identities = [RunIdentity.read(folder / name) for name in ("results", "checkpoints")]
    return {identity.run_id for identity in identities if identity is not None}


def earlier_run(folder: Path) -> str:
    """A run that has saved steps 2 and 4 and logged four."""
    run_id = claim(folder).identity.run_id
    for step in (2, 4):
        saved(folder / "checkpoints", step, run_id)
    logged(folder / "results", 0, 1, 2, 3)
    return run_id


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_run_names_itself_in_both_folders(tmp_path: Path) -> None:
    identity = claim(tmp_path).identity
    assert run_of(tmp_path) == {identity.run_id} and identity.begun and not identity.follows
    assert claim(tmp_path / "other").identity.run_id != identity.run_id


def test_a_start_over_an_earlier_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RefusedFolders, match=r"--checkpoint_dir .* holds checkpoints .*0000004.*--auto_resume True .*--overwrite_run True"):
        claim(tmp_path)
    assert files(tmp_path) == before


def test_checkpoints_of_earlier_versions_and_damaged_ones_count_too(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 2)
    (tmp_path / "checkpoints/0000002" / step_folders.STATE_FILE).unlink()
    with pytest.raises(RefusedFolders, match="0000002"):
        claim(tmp_path)


def test_auto_resume_continues_the_run_of_the_folder(tmp_path: Path) -> None:
    run_id = earlier_run(tmp_path)
    assert claim(tmp_path, auto_resume=True).identity.run_id == run_id


def test_a_run_of_an_earlier_version_gets_an_identity_when_it_is_continued(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 2)
    logged(tmp_path / "results", 0, 1)
    run_id = claim(tmp_path, auto_resume=True).identity.run_id
    assert run_of(tmp_path) == {run_id} and claim(tmp_path, auto_resume=True).identity.run_id == run_id


def test_a_run_that_ended_before_its_first_save_starts_again_as_itself(tmp_path: Path) -> None:
    run_id = claim(tmp_path, auto_resume=True).identity.run_id
    logged(tmp_path / "results", 0, 1)
    again = claim(tmp_path, auto_resume=True)
    assert (again.identity.run_id, again.notes) == (run_id, ())


def test_metrics_of_an_earlier_run_are_not_wiped(tmp_path: Path) -> None:
    logged(tmp_path / "results", 0, 1)
    with pytest.raises(RefusedFolders, match=r"--results_dir .* holds the metrics of an earlier run .*--overwrite_run True"):
        claim(tmp_path)


def test_removed_checkpoints_start_a_run_anew_and_its_old_results_stay_beside(tmp_path: Path) -> None:
    run_id = earlier_run(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    again = claim(tmp_path, auto_resume=True)
    assert again.identity.run_id != run_id and "overwritten-001" in again.notes[0]
    assert (tmp_path / "results/overwritten-001/metrics.jsonl").is_file() and not (tmp_path / "results/metrics.jsonl").exists()


def test_overwrite_moves_every_file_of_the_earlier_run_aside(tmp_path: Path) -> None:
    run_id = earlier_run(tmp_path)
    (tmp_path / "results/index").mkdir()
    converted = saved(tmp_path / "checkpoints", 0, config={"finetune_from_hf": True})
    before = files(tmp_path)
    fresh = claim(tmp_path, overwrite=True)
    assert fresh.identity.run_id != run_id and len(fresh.notes) == 2
    after = files(tmp_path)
    moved = {
        name.replace("/overwritten-001", ""): text for name, text in after.items() if "overwritten-001" in name or converted.name in name
    }
    assert moved == before, "each file of the earlier run exists once more, in the folder beside"
    assert set(after) - {name for name in after if "overwritten" in name or converted.name in name} == {
        f"results/{RUN_FILE}", f"checkpoints/{RUN_FILE}"
    }  # fmt: skip
    assert (tmp_path / "results/index").is_dir(), "an index depends on the data alone"
    logged(tmp_path / "results", 0)
    assert "overwritten-002" in claim(tmp_path, overwrite=True).notes[0]


def test_what_a_run_starts_from_is_not_moved(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    with pytest.raises(ValueError, match="--overwrite_run would move --resume_from"):
        claim(tmp_path, overwrite=True, resume_from=tmp_path / "checkpoints/0000004", model_only=True)


def test_a_run_may_start_beside_a_converted_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 0, config={"finetune_from_hf": True})
    assert claim(tmp_path, resume_from=tmp_path / "checkpoints", model_only=True).identity.run_id


def test_two_folders_of_two_runs_are_refused(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    other = earlier_run(tmp_path / "other")
    with pytest.raises(ValueError, match=f"holds run {other}; name the two folders of one run"):
        claim_folders(start(tmp_path, auto_resume=True), tmp_path / "other/results")


def test_a_named_checkpoint_continues_its_run_unless_later_ones_would_mix(tmp_path: Path) -> None:
    run_id = earlier_run(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    assert claim(tmp_path, resume_from=checkpoints).identity.run_id == run_id
    with pytest.raises(RefusedFolders, match="also holds later checkpoints of that run .*0000004"):
        claim(tmp_path, resume_from=checkpoints / "0000002")
    branch = claim(tmp_path / "branch", resume_from=checkpoints / "0000002").identity
    assert branch.follows == run_id and branch.run_id != run_id


def test_a_branch_may_go_on_in_the_results_of_its_run_only(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    earlier_run(tmp_path / "other")
    settings = start(tmp_path / "branch", resume_from=tmp_path / "checkpoints/0000002")
    with pytest.raises(RefusedFolders, match="holds the metrics of an earlier run"):
        claim_folders(settings, tmp_path / "other/results")
    assert claim_folders(settings, tmp_path / "results").identity.follows


def test_auto_resume_passes_over_checkpoints_that_name_another_run(tmp_path: Path) -> None:
    run_id = earlier_run(tmp_path)
    saved(tmp_path / "checkpoints", 6, "ffffffffffff")
    settings = start(tmp_path, auto_resume=True, run_id=run_id)
    assert weight_source(settings).checkpoint == tmp_path / "checkpoints/0000004"


@pytest.mark.parametrize("content", ["{}", "", "{", "[]"])
def test_a_damaged_identity_is_refused_and_without_the_file_the_run_goes_on(tmp_path: Path, content: str) -> None:
    run_id = earlier_run(tmp_path)
    for folder in ("results", "checkpoints"):
        (tmp_path / folder / RUN_FILE).write_text(content)
        with pytest.raises(ValueError, match=r"run\.json does not describe a run \(.+\); remove the file to continue"):
            claim(tmp_path, auto_resume=True)
        (tmp_path / folder / RUN_FILE).unlink()
    assert claim(tmp_path, auto_resume=True).identity.run_id == run_id and run_of(tmp_path) == {run_id}
