"""Bytes of a quantized denoiser as it is stored, beside those that its bits need.

    python benchmarks/artefact_sizes.py [--bits 8 6 4 3 2]

The embedded model, 26 calls with parameters of their own, which is the most that tables take. Bytes depend
neither on rounding nor on prompts, so weights are rounded to nearest, after one prompt. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import halftone
from halftone.artefact.inspect import ideal_bytes
from halftone.artefact.load import describe
from halftone.prompts import read_prompts

MODEL, PROMPTS = Path("data/models/scenes-t2i"), Path("data/prompts/calibration.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2], help="of the weights")
    rows = [_row(bits) for bits in parser.parse_args().bits]
    print(
        "\n| weights | bytes stored | codes at their bits, and floats | stored / needed | original / stored |"
    )
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


def _row(bits: int) -> str:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "artefact"
        halftone.quantize(
            MODEL,
            "static",
            read_prompts(PROMPTS)[:1],
            folder,
            bits=f"w{bits}a8",
            axes={"rounding": "nearest"},
            steps=25,
            guidance=2.0,
            resolution=64,
        )
        described = describe(folder)
        stored, needed = described.tensors.stat().st_size, ideal_bytes(described)
    smaller = 2**20 * described.plan.sizes.original_mib / stored
    return f"| {bits} bits | {stored:,} | {needed:,} | {stored / needed:.3f} | {smaller:.2f} |"


if __name__ == "__main__":
    main()
