# SPDX-License-Identifier: Apache-2.0
"""The documentation is true as far as a machine can tell: commands parse, links lead somewhere, flags exist, pages are listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT, Command, check, commands, flags_of

COMMANDS = commands()
PROGRAMS = (
    "megatron_bagel.train", "megatron_bagel.plan", "megatron_bagel.generate", "tools/verify_golden.py",
    "tools/record_runs.py", "tools/compare_runs.py",
    "tools/checkpoint_convert/hf_to_megatron.py",
    "tools/checkpoint_convert/megatron_to_hf.py", "tools/checkpoint_convert/init_from_pretrained.py",
    "tools/checkpoint_convert/inspect_checkpoint.py", "data_tools/build_index.py", "data_tools/inspect_index.py",
    "data_tools/make_sample_data.py", "data_tools/train_tokenizer.py", "data_tools/merge_index.py", "data_tools/verify_index.py",
    "data_tools/cache_latents.py", "megatron_bagel.evaluate", "megatron_bagel convert push",
    "megatron_bagel data stats", "megatron_bagel quickstart", "benchmarks.released_size",
)  # fmt: skip
#: Flags that the pages mention and no program lists: those of other programs, and an abbreviation.
FOREIGN_FLAGS = {
    "__ipc", "__shm_size", "__logdir", "__max_restarts", "__num_worker", "__deploy_config",
    "__ft_rank_heartbeat_timeout", "__ft_initial_rank_heartbeat_timeout",
    # Of forks of BAGEL, and of py-spy.
    "__save_after", "__dist_backend", "__resume_from_hf", "__split_vae_encode", "__model_name", "__debug",
    "__subprocesses", "__pid", "__duration",
}  # fmt: skip
#: Parallel axes, each with a row in the table of docs/status.md.
AXES = (
    "--tensor_model_parallel_size", "--sequence_parallel", "--pipeline_model_parallel_size", "--virtual_pipeline_model_parallel_size",
    "--context_parallel_size", "--cp_comm_type",
)  # fmt: skip


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, by the rule of code hosts."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_commands_parse(command: Command, capsys: pytest.CaptureFixture) -> None:
    try:
        check(command)
    except (SystemExit, ValueError) as error:
        pytest.fail(f"{command.text}\n{error}\n{capsys.readouterr().err}")


def test_the_first_commands_are_found() -> None:
    """The reader of pages finds what a person reads first."""
    texts = [command.text for command in COMMANDS if command.page.name == "README.md" and command.page.parent == ROOT]
    assert texts[0].startswith("bash examples/quickstart.sh") and texts[1].startswith("bash tests/run.sh")
    assert any("finetune_from_hf True" in text and "--num_worker 1" in text for text in texts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("python -m megatron_bagel.train --max_latent_sizes 64", "no flag takes --max_latent_sizes 64"),
        ("python -m megatron_bagel.train --lr_scheduler linear", "invalid choice: 'linear'"),
        ("python -m megatron_bagel.generate --model DIR --tasks t2i", "no flag takes --tasks t2i"),
        ("megatron-bagel data verify index --worker 8 --fast", "no flag takes --fast"),
        ("megatron-bagel data bild --output index", "did you mean data build"),
        ("python -m megatron_bagel plan --gpu 8 --no-such-flag", "no flag takes --no-such-flag"),
        ("python tools/no_such_tool.py", "there is no file"),
        ("bash examples/no_such_script.sh", "there is no file"),
        ("python -m no_such_module", "there is no module"),
    ],
)
def test_wrong_commands_are_noticed(line: str, complaint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        check(Command(ROOT / "README.md", 1, line))
    assert complaint in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("tests/*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(there), f"{page.name}: {target}, headings are {sorted(slugs(there))}"


@pytest.mark.filterwarnings("ignore")
def test_flags_in_the_text_exist() -> None:
    known = flags_of(PROGRAMS) | FOREIGN_FLAGS
    for page in (page for page in PAGES if page.name not in ("flags.md", "recorded.md")):  # made from flags, and from commands
        for code in re.findall(r"`([^`\n]+)`", without_code(page)):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert flag.replace("-", "_") in known, f"{page.name}: `{code}`"


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", text_of(ROOT / "docs" / "README.md")))
    assert linked == {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}


@pytest.mark.parametrize("flag", AXES)
def test_what_the_status_page_calls_tested_has_a_test(flag: str) -> None:
    """The row of a parallel axis says that it is tested exactly if some test of whole runs sets its flag."""
    (row,) = [line for line in text_of(ROOT / "docs" / "status.md").splitlines() if line.startswith("|") and f"`{flag}`" in line]
    runs = [path for path in (ROOT / "tests" / "training").glob("*.py") if flag.removeprefix("--") in text_of(path)]
    assert ("tested on CPU" in row) == bool(runs), f"{[path.name for path in runs]} set {flag}, and the page says: {row}"
