"""A CLIP tokenizer whose merges make every word of the grammar one token.

Any other word falls apart into smaller merges and byte pieces, so every text has an encoding.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from transformers import CLIPTokenizer

from halftone.files import write_json, write_text
from halftone.scenes.grammar import vocabulary

MAX_LENGTH = 32  # tokens, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"


def _byte_letters() -> list[str]:
    """The printable letter that stands for each of the 256 bytes, in CLIP's byte-level BPE."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(len(others))]


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces byte-pair encoding leaves of a word: the earliest merge first, until none applies."""
    pieces = [*word[:-1], word[-1] + _END_OF_WORD]
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        at = min(range(len(pairs)), key=lambda k: ranks.get(pairs[k], len(ranks)))
        if pairs[at] not in ranks:
            break
        pieces[at : at + 2] = ["".join(pairs[at])]
    return pieces


def merges_for(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that join every word into one piece.

    Words are taken in turn, and wherever the merges so far leave pieces, the first two are joined by
    a new merge. New merges come last, so they never change a word that was finished before.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _split(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    return list(ranks)


def build() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (piece -> id) and merges; start and end tokens have the two highest ids."""
    letters = _byte_letters()
    pieces = letters + [c + _END_OF_WORD for c in letters]
    merges = merges_for(vocabulary())
    pieces += [a + b for a, b in merges]
    return {piece: k for k, piece in enumerate([*dict.fromkeys(pieces), START, END])}, merges


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes ``vocab.json``, ``merges.txt`` and the settings; returns the tokenizer read back."""
    vocab, merges = build()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **special}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    return CLIPTokenizer.from_pretrained(folder)
