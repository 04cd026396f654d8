# SPDX-License-Identifier: Apache-2.0
"""The sample data has the guide's layout and schemas, is the same for the same seed, and is refused where it cannot be made."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from megatron_bagel.cli.data.sample import main as make_sample_data
from megatron_bagel.cli.data.tokenizer import main as train_tokenizer
from megatron_bagel.config.architecture import LLMArch, ViTArch
from megatron_bagel.sample_world.score import read_single

SMALL = ["--t2i", "7", "--edit", "5", "--vlm", "4", "--text", "3", "--edit-steps", "3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    make_sample_data([str(out), *SMALL])
    return out


def test_t2i_rows_show_what_their_captions_say(made: Path) -> None:
    table = pq.read_table(made / "t2i")
    assert table.schema.field("image").type == "binary" and table.schema.field("captions").type == "string"
    rows = table.to_pylist()
    assert len(rows) == 7
    for row in rows:
        shape = read_single(np.asarray(Image.open(io.BytesIO(row["image"])))).shape
        for caption in json.loads(row["captions"]).values():
            assert f"{shape.colour} {shape.shape}" in caption and shape.position in caption


def test_edit_rows_have_one_instruction_per_step(made: Path) -> None:
    folder = made / "editing/seedxedit_multi"
    info = json.loads((made / "editing/parquet_info/seedxedit_multi.json").read_text())
    assert sorted(info) == sorted(str(path) for path in folder.iterdir())
    rows = []
    for path, said in info.items():
        file = pq.ParquetFile(path)
        assert (said["num_row_groups"], said["num_rows"]) == (file.num_row_groups, file.metadata.num_rows)
        rows += file.read().to_pylist()
    assert len(rows) == 5
    assert {len(row["image_list"]) for row in rows} <= {2, 3, 4}
    for row in rows:
        assert len(row["instruction_list"]) == len(row["image_list"]) - 1
        assert all(ways and all(isinstance(text, str) for text in ways) for ways in row["instruction_list"])


def test_conversations_name_existing_images(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "vlm/llava_ov_si.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        shape = read_single(np.asarray(Image.open(made / "vlm/images" / line["image"]))).shape
        turns = line["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
        assert turns[0]["value"].startswith("<image>\n") and "<image>" not in turns[2]["value"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if "what color is it" in question["value"]:
                assert answer["value"] == shape.colour


def test_dataset_yaml_and_model_configs_fit_the_data(made: Path) -> None:
    dataset = yaml.safe_load((made / "dataset.yaml").read_text())
    places = dataset.pop("dataset_info")
    assert set(dataset) == set(places) == {"t2i_pretrain", "unified_edit", "vlm_sft", "text"}
    for group, keys in dataset.items():
        for name in keys["dataset_names"]:
            for key, path in places[group][name].items():
                assert key.startswith("num_") or Path(path).exists()
    llm = LLMArch.from_hf(json.loads((made / "llm/config.json").read_text()))
    ViTArch.from_hf(json.loads((made / "vit/config.json").read_text()))
    tokens = json.loads((made / "tokenizer/tokenizer.json").read_text())
    assert llm.vocab_size % 64 == 0 and llm.vocab_size >= len(tokens["model"]["vocab"]) + len(tokens["added_tokens"])


@pytest.mark.parametrize(("flags", "longest", "shortest"), [
    ([], 70, 70),
    (["--vit-image-size", "42"], 42, 42),
    (["--image-size", "96x48"], 98, 56),
    (["--image-size", "96x48", "--vit-image-size", "42"], 42, 28),
])  # fmt: skip
def test_size_at_which_the_tower_sees_pictures(tmp_path: Path, flags: list[str], longest: int, shortest: int) -> None:
    make_sample_data([str(tmp_path / "data"), "--t2i", "1", "--edit", "1", "--vlm", "1", *flags])
    dataset = yaml.safe_load((tmp_path / "data/dataset.yaml").read_text())
    for args in (dataset["unified_edit"]["vit_image_transform_args"], dataset["vlm_sft"]["image_transform_args"]):
        assert (args["max_image_size"], args["min_image_size"]) == (longest, shortest)
    latents = dataset["t2i_pretrain"]["image_transform_args"]
    assert latents["image_stride"] == 16 and latents["max_image_size"] == (96 if "--image-size" in flags else 64)


def test_conversations_ask_the_given_kinds_of_questions(tmp_path: Path) -> None:
    make_sample_data(
        [str(tmp_path / "data"), "--t2i", "0", "--edit", "0", "--vlm", "3", "--questions-per-image", "3", "--question-kinds", "shape"]
    )
    for line in (tmp_path / "data/vlm/llava_ov_si.jsonl").read_text().splitlines():
        assert [turn["value"] for turn in json.loads(line)["conversations"] if turn["from"] == "human"] == ["<image>\nwhat shape is it?"]


def test_edited_pictures_may_hold_more_shapes_than_others(tmp_path: Path) -> None:
    flags = ["--t2i", "2", "--edit", "40", "--vlm", "0", "--edit-max-count", "9", "--edit-kinds", "recolour-all"]
    make_sample_data([str(tmp_path / "data"), *flags])
    for row in pq.read_table(tmp_path / "data/t2i").to_pylist():
        assert read_single(np.asarray(Image.open(io.BytesIO(row["image"])))).shape is not None
    instructions = {
        way for row in pq.read_table(tmp_path / "data/editing/seedxedit_multi").to_pylist() for way in row["instruction_list"][0]
    }
    subjects = {subject for way in instructions for subject in ("it", "them") if subject in way.split()}
    assert subjects == {"it", "them"}, "from one shape to many"


def test_rows_depend_on_seed_and_number_only(made: Path, tmp_path: Path) -> None:
    make_sample_data([str(tmp_path / "more"), "--t2i", "9", "--edit", "2", "--vlm", "0"])
    make_sample_data([str(tmp_path / "other"), "--t2i", "7", "--edit", "0", "--vlm", "0", "--seed", "1"])
    first = pq.read_table(made / "t2i").to_pylist()
    assert pq.read_table(tmp_path / "more/t2i").to_pylist()[:7] == first
    assert pq.read_table(tmp_path / "other/t2i").to_pylist() != first
    assert not (tmp_path / "more/vlm").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--t2i", "0", "--edit", "0", "--vlm", "0"], "not all zero"),
        (["--hold-out", "red"], "colour:shape"),
        (["--image-size", "big"], "'big'"),
        (["--edit-kinds", "explode"], "explode"),
        (["--edit-max-count", "10"], "--edit-max-count"),
        (["--edit-max-count", "0"], "--edit-max-count"),
        (["--question-kinds", "colour", "why"], "--question-kinds"),
        (["--question-kinds", "size"], "no such question"),
        (["--captions-per-image", "0"], "--captions-per-image"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(flags: list[str], said: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        make_sample_data([str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(made: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        make_sample_data([str(made), *SMALL])
    assert "not empty" in capsys.readouterr().err


def test_train_tokenizer_reads_text_and_json_lines(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("a red circle\n" * 10)
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": [{"value": "blue squares"}] * 10}) + "\n")
    train_tokenizer([str(tmp_path / "tok"), "--vocab-size", "300", "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    vocabulary = json.loads((tmp_path / "tok/vocab.json").read_text())
    assert "\u0120circle" in vocabulary and "\u0120squares" in vocabulary
    (tmp_path / "b.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(SystemExit):
        train_tokenizer([str(tmp_path / "tok"), "--text", str(tmp_path / "b.jsonl")])
    assert "b.jsonl, line 2" in capsys.readouterr().err
