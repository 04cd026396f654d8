# SPDX-License-Identifier: Apache-2.0
"""Every command's flags for files and folders take ``~`` and ``$VAR``, also where no shell has replaced them, as in ``--output=~/x``."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_bagel.cli import evaluate, quickstart
from megatron_bagel.cli.convert import hf_to_megatron, init_from_pretrained, inspect_checkpoint, megatron_to_hf
from megatron_bagel.cli.data import build, inspect, latents, merge, sample, verify
from megatron_bagel.inference.batch.arguments import build_parser as generation_parser
from tests.conftest import ROOT

#: Words that stand for a file or a folder in the help of a command.
PATH_WORDS = {"DIR", "FILE", "FOLDER", "PATH", "YAML", "OUT", "PART", "QUESTIONS"}
PATH_TYPES = {"path_flag", "location_flag"}


def flags(source: str) -> Iterator[tuple[str, str | None, object]]:
    """Yield (first name, type, metavar) of every argument that a module gives to argparse."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in ("add_argument", "flag") and node.args:
            settings = {keyword.arg: keyword.value for keyword in node.keywords}
            metavar, kind = settings.get("metavar"), settings.get("type")
            yield (
                ast.unparse(node.args[0]),
                ast.unparse(kind) if kind else None,
                metavar.value if isinstance(metavar, ast.Constant) else None,
            )


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "megatron_bagel").rglob("*.py")))
def test_every_flag_for_a_path_has_the_type_of_one(path: str) -> None:
    for name, kind, metavar in flags((ROOT / path).read_text(encoding="utf-8")):
        assert kind != "Path", f"{path}: {name} takes Path; give it path_flag"
        assert metavar not in PATH_WORDS or kind in PATH_TYPES, f"{path}: {name} is a path of type {kind}; give it path_flag"


BUILD = ["--dataset_config_file=a", "--tokenizer=b"]
Parse = Callable[[Sequence[str]], argparse.Namespace]


@pytest.mark.parametrize(
    ("parse", "words", "name"),
    [
        (lambda words: build.parse_arguments(words, "x"), [*BUILD, "--output={}"], "output"),
        (lambda words: build.parse_arguments(words, "x"), [*BUILD, "--output=c", "--data-root={}"], "data_root"),
        (lambda words: inspect.parse_arguments(words, "x"), ["a", "--png={}"], "png"),
        (lambda words: latents.parse_arguments(words, "x"), ["a", "--dataset_config_file=b", "--output=c", "--vae={}"], "vae"),
        (lambda words: merge.parse_arguments(words, "x"), ["--output={}"], "output"),
        (lambda words: verify.parse_arguments(words, "x"), ["{}"], "index"),
        (sample.build_parser("x").parse_args, ["{}"], "out"),
        (hf_to_megatron.parser("x").parse_args, ["--model={}", "--output=a"], "model"),
        (megatron_to_hf.parser("x").parse_args, ["--checkpoint={}", "--output=a"], "checkpoint"),
        (init_from_pretrained.parser("x").parse_args, ["--llm={}", "--output=a"], "llm"),
        (inspect_checkpoint.parser("x").parse_args, ["verify", "{}"], "checkpoint"),
        (generation_parser().parse_args, ["--model={}"], "model"),
        (generation_parser().parse_args, ["--model=a", "--out={}"], "out"),
        (evaluate.build_parser().parse_args, ["--model=a", "geneval", "{}"], "questions"),
        (quickstart.build_parser("x").parse_args, ["{}"], "out"),
    ],
)  # fmt: skip
def test_home_and_variables(
    parse: Parse, words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    assert str(getattr(parse([word.format("~/x") for word in words]), name)) == f"{tmp_path}/home/x"
    assert str(getattr(parse([word.format("${RUNS}/x") for word in words]), name)) == f"{tmp_path}/runs/x"
    with pytest.raises(SystemExit, match="2"):
        parse([word.format("$NO_SUCH_PLACE/x") for word in words])
    assert "path $NO_SUCH_PLACE/x: the environment has no variable NO_SUCH_PLACE" in capsys.readouterr().err


def test_input_images_are_paths_in_their_order() -> None:
    args = generation_parser().parse_args(["--model=a", "--prompt", "$5 and ~", "--image", "s3://bucket/~x", "b.png"])
    assert args.terms == [("text", "$5 and ~"), ("image", "s3://bucket/~x"), ("image", "b.png")]
