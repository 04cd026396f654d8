# SPDX-License-Identifier: Apache-2.0
"""The command: pictures and answers on disk from a model folder, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_bagel.cli.generate import main
from tests.inference.tiny_model import write_tiny_model

QUICK = ["--num-timesteps", "3", "--vae-transform", "32", "16", "--vit-transform", "42", "14", "--max-length", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_pictures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(model), "--prompt", "a red circle", "two", "--image_size", "16x24", "--num-samples", "2", "--out", str(out)]
    assert main([*argv, *QUICK]) == 0
    lines = results(out)
    assert [(line["id"], line["seed"]) for line in lines] == [("00000_0", 0), ("00000_1", 1), ("00001_0", 0), ("00001_1", 1)]
    sizes = [Image.open(out / line["image"]).size for line in lines]
    assert sizes == [(24, 16)] * 4
    pixels = [(out / line["image"]).read_bytes() for line in lines]
    assert len(set(pixels)) == 4
    assert "4 answers" in capsys.readouterr().out


def test_a_trained_folder_without_configs_gives_the_same_picture(model: Path, tmp_path: Path) -> None:
    trained, llm, vit = (tmp_path / name for name in ("0002000", "llm", "vit"))
    for folder in (trained, llm, vit):
        folder.mkdir()
    shutil.copy(model / "ema.safetensors", trained / "ema_fp32.safetensors")
    (trained / "config.json").write_text('{"architectures": ["Bagel"],}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, llm / name)
    shutil.copy(model / "llm_config.json", llm / "config.json")
    shutil.copy(model / "vit_config.json", vit / "config.json")
    prompt = ["--prompt", "a red circle", "--image-size", "16x16", *QUICK, "--out"]
    assert main(["--model", str(model), *prompt, str(tmp_path / "whole")]) == 0
    parts = ["--weights-name", "ema_fp32.safetensors", "--llm-path", str(llm), "--vit_path", str(vit)]
    argv = ["--model", str(trained), *parts, "--autoencoder", str(model / "ae.safetensors"), *prompt, str(tmp_path / "parts")]
    assert main(argv) == 0
    whole, assembled = (Image.open(tmp_path / name / "00000.png").tobytes() for name in ("whole", "parts"))
    assert whole == assembled


def test_a_cpu_says_that_it_replays_no_graphs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder of launched steps may be continued with captured ones: they are the same."""
    argv = ["--model", str(model), "--image-size", "16x16", "--out", str(tmp_path), *QUICK]
    assert main([*argv, "--prompt", "a"]) == 0
    assert "graphs" not in capsys.readouterr().out
    assert main([*argv, "--prompt", "a", "b", "--resume", "--capture-steps"]) == 0
    assert "replay no graphs here: only a GPU replays graphs" in capsys.readouterr().out
    assert len(results(tmp_path)) == 2


def test_batch_size_changes_nothing(model: Path, tmp_path: Path) -> None:
    for size in ("1", "3"):
        argv = ["--model", str(model), "--prompt", "a", "b", "c", "--image-size", "16x16", "--batch-size", size, "--out"]
        assert main([*argv, str(tmp_path / size), *QUICK]) == 0
    for name in ("00000.png", "00001.png", "00002.png"):
        first, second = (Image.open(tmp_path / size / name).tobytes() for size in ("1", "3"))
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1


def test_answer_edit_and_interleave(model: Path, photo: Path, tmp_path: Path) -> None:
    common = ["--model", str(model), *QUICK, "--out"]
    assert main([*common, str(tmp_path / "a"), "--task", "understand", "--image", str(photo), "--prompt", "what color is it?"]) == 0
    (line,) = results(tmp_path / "a")
    assert isinstance(line["text"], str) and "image" not in line
    assert main([*common, str(tmp_path / "b"), "--task", "edit", "--image", str(photo), "--prompt", "make it red", "--think"]) == 0
    (line,) = results(tmp_path / "b")
    assert Image.open(tmp_path / "b" / line["image"]).size == (24, 16) and "thought" in line
    order = ["--task", "interleave", "--prompt", "like", "--image", str(photo), "--prompt", "draw"]
    assert main([*common, str(tmp_path / "c"), *order]) == 0
    (line,) = results(tmp_path / "c")
    assert [list(term) for term in line["terms"]] == [["text"], ["image"], ["text"]]
    several = [*order, "--output", "text", "image", "text", "--image-size", "16x16"]
    assert main([*common, str(tmp_path / "d"), *several]) == 0
    (line,) = results(tmp_path / "d")
    assert line["output"] == ["text", "image", "text"] and [sorted(item)[-1] for item in line["items"]] == ["text", "image", "text"]
    assert Image.open(tmp_path / "d" / line["items"][1]["image"]).size == (16, 16)


def test_prompts_from_a_file(model: Path, photo: Path, tmp_path: Path) -> None:
    lines = [{"id": "one", "prompt": "a", "size": [16, 16]}, {"id": "two", "task": "understand", "prompt": "what?", "image": photo.name}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--model", str(model), "--input", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*argv, "--do-sample", "--top-p", "0.9"]) == 0
    first, second = results(tmp_path / "out")
    assert first["image"] == "one.png" and "text" in second


def test_an_interrupted_run_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--model", str(model), "--prompt", "a", "b", "c", "--image-size", "16x16", *QUICK]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for out in (whole, torn):
        assert main([*argv, "--out", str(out)]) == 0
    lines = (torn / "results.jsonl").read_text().splitlines(keepends=True)
    (torn / "results.jsonl").write_text(lines[0] + lines[1][:20])
    for name in ("00001.png", "00002.png"):
        (torn / name).unlink()
    before = (torn / "00000.png").stat().st_mtime_ns
    assert main([*argv, "--out", str(torn), "--resume", "--batch-size", "1"]) == 0
    assert (torn / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()
    assert (torn / "00000.png").stat().st_mtime_ns == before
    first, second = (Image.open(out / "00002.png").tobytes() for out in (torn, whole))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1
    for change, said in ((["--cfg-text-scale", "2"], "cfg_text_scale was 3.0, now 2.0"), (["--seed", "5"], "another prompt or seed")):
        assert main([*argv, *change, "--out", str(torn), "--resume"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "a", "--image-size", "17x16"], "height 17 must be a positive multiple of 8"),
        (["--prompt", "a", "--image-size", "big"], "--image-size big is not of the form HxW"),
        (["--prompt", "a", "--num-timesteps", "1"], "num_timesteps is 1"),
        (["--prompt", "a", "--cfg-text-scale", "0"], "cfg_text_scale is 0"),
        (["--prompt", "a", "--enable-taylorseer"], "TaylorSeer"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--system-prompt", "b"], "pass --think"),
        (["--prompt", "a", "--input", "x.jsonl"], "either --input or --prompt"),
        (["--task", "edit", "--prompt", "a"], "needs an image to change"),
        (["--task", "edit", "--prompt", "a", "--image", "gone.png"], "image gone.png does not exist"),
        ([], "nothing to do"),
        (["--serve", "--port", "70000"], "--port 70000: cannot listen"),
        (["--serve", "--num-timesteps", "1"], "num_timesteps is 1"),
    ],
)
def test_mistakes_get_one_sentence(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], said: str) -> None:
    assert main(["--model", str(model), "--out", str(tmp_path / "out"), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--model", str(tmp_path / "gone"), "--prompt", "a", "--out", str(tmp_path / "out")]) == 2
    assert "gone does not exist" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for option in ("--task", "--cfg-text-scale", "--cfg-img-scale", "--cfg-interval", "--cfg-renorm-type", "--cfg-renorm-min", "--top-p"):
        assert option in said
