# SPDX-License-Identifier: Apache-2.0
"""Train a Qwen2-style BPE tokenizer on text files: plain text, or any string found in JSON lines.

%(prog)s OUT --vocab-size 8192 --text captions.txt conversations.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_bagel.cli.usage import command_parser
from megatron_bagel.common.json_text import check_encodable, decode, head_of, parse_json, wrong_container
from megatron_bagel.common.paths import path_flag
from megatron_bagel.common.writable import check_writable, writing_to
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer


def strings(value: object) -> Iterator[str]:
    """Yield every string inside a JSON value, at any depth. Keys are not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def read_texts(paths: list[Path]) -> Iterator[str]:
    """Yield the texts of the files, line by line. Raises ValueError with file and line for a .jsonl line that is not JSON."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--text: there is no file {path}")
        with path.open("rb") as lines:
            if path.suffix == ".jsonl" and (problem := wrong_container(head_of(lines))):
                raise ValueError(f"{path} {problem}")
            for number, line in enumerate(lines, start=1):
                label = f"{path}, line {number}"
                try:
                    texts = strings(parse_json(line)) if path.suffix == ".jsonl" else [decode(line).replace("\r\n", "\n")]
                    for text in texts:
                        check_encodable(text)
                        yield text
                except ValueError as error:
                    raise ValueError(f"{label}: {error}") from error


def main(argv: Sequence[str] | None = None, prog: str = "megatron-bagel data tokenizer") -> int:
    """Train the tokenizer. Errors of the input end with one line and exit status 2."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("out", type=path_flag, metavar="OUT", help="folder for the tokenizer's files")
    parser.add_argument("--text", type=path_flag, nargs="+", required=True, metavar="FILE", help="plain text files or .jsonl")
    parser.add_argument("--vocab-size", type=int, default=8192, help="largest number of tokens, including special tokens (default 8192)")
    args = parser.parse_args(argv)
    try:
        check_writable(args.out, "OUT")
        with writing_to(args.out, "OUT"):
            size = train_tokenizer(read_texts(args.text), args.out, args.vocab_size)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {size} tokens")
    return 0
