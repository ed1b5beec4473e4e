from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from halftone.errors import UserError
from halftone.prompts import check_lengths, prompts_sha256, read_prompts, token_limit


def test_reads_lines_in_order_without_surrounding_blanks(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red star \r\n  çà 👩‍🚀 et là\nthird".encode())
    assert read_prompts(path) == ["a red star", "çà 👩‍🚀 et là", "third"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompts"),
        (b" \n\n", "holds no prompts"),
        (b"one\n\nthree\n", "line 2 is blank"),
        (b"one\ntwo\nthree\n\n", "line 4 is blank"),
        (b"one\ntwo\none \n", "line 3 repeats line 1"),
        (b"one\ntw\xff\n", r"byte 6 \(line 2\) is not UTF-8"),
        (b"\xef\xbb\xbfone\n", "byte order mark"),
        (b"one\nt\x00wo\n", "line 2 holds a control character"),
        (b"one\ntwo \xe2\x80\xa8 three\n", "line 2 holds a control character"),
    ],
)
def test_refuses_what_would_shift_or_change_prompts(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such prompt file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)


def test_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one\ntwo\n")
    assert prompts_sha256(read_prompts(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert prompts_sha256(["one", "two"]) != prompts_sha256(["one\ntwo", ""])


def test_prompts_that_the_tokenizer_would_cut(tiny_pipeline: StableDiffusionPipeline) -> None:
    limit = token_limit(tiny_pipeline, tiny_pipeline.tokenizer)
    assert limit == 32
    fits = " ".join(["red"] * (limit - 2))
    check_lengths([fits], tiny_pipeline)
    with pytest.raises(UserError, match=r"list\.txt: line 12 has 33 tokens, tokenizer takes 32"):
        check_lengths(["a star", fits + " red"], tiny_pipeline, "list.txt", first=10)
