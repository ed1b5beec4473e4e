"""Every word of the grammar is one token, and every other text still has an encoding."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from halftone.scenes.grammar import PHRASINGS, all_singles, caption, vocabulary
from halftone.scenes.tokenizer import END, MAX_LENGTH, START, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_each_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in vocabulary():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_a_caption_is_its_words_between_start_and_end(tokenizer: CLIPTokenizer) -> None:
    scene = next(all_singles())
    for phrasing in range(len(PHRASINGS)):
        text = caption(scene, phrasing)
        ids = tokenizer(text, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
        words = tokenizer.convert_ids_to_tokens(ids)
        spoken = [f"{w}</w>" for w in text.split()]
        assert words == [START, *spoken] + [END] * (MAX_LENGTH - 1 - len(spoken))


def test_other_text_falls_apart_into_bytes(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a zebra über", add_special_tokens=False).input_ids
    assert len(ids) > 3
    assert tokenizer.decode(ids).strip() == "a zebra über"


def test_the_folder_survives_saving_and_loading(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a small red star on a plain grey background"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == MAX_LENGTH
