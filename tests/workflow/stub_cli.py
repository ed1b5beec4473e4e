"""Stands in for halftone's command line in tests of the workflow alone: no models, milliseconds a job.

Every output is a digest of the arguments and of the contents of the files among them, so that it changes
when, and only when, one of these does. `stub.json` in the working folder can make a verb slow or make it
fail.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

OUTPUTS = {
    "analyze": ("plan.json", "statistics.json", "ranges.svg"),
    "reparameterize": ("factors.safetensors", "imbalance.json", "imbalance.svg"),
    "sensitivity": ("sensitivity.json", "sensitivity.svg"),
    "export": ("unet/quantized.safetensors", "plan.json", "manifest.json"),
    "proxy": ("card.json", "card.md"),
    "outliers": ("outliers.json", "outliers.svg", "worst.svg"),
}
IGNORED = ("--scratch", "--cache-mib", "--timings")


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    verb = words[0]
    if verb in ("stage", "run", "record", "trust", "prune", "plan"):
        from halftone.cli.real import main as real

        return real(words)
    behaviour = json.loads(Path("stub.json").read_text()) if Path("stub.json").exists() else {}
    time.sleep(behaviour.get("sleep", {}).get(verb, 0))
    if message := behaviour.get("fail", {}).get(verb):
        print(f"working on {verb}", file=sys.stderr)
        print(message, file=sys.stderr)
        return 2 if message.startswith("halftone: ") else 1
    output = Path(words[words.index("-o") + 1])
    digest = _digest(words)
    if verb == "summary":
        _summary(words, output)
    elif verb == "metrics":
        _write(output, json.dumps({"digest": digest}))
        _write(output.with_suffix(".safetensors"), digest)
    else:
        for path in [output / name for name in OUTPUTS[verb]] if verb in OUTPUTS else [output]:
            _write(path, digest)
    if "--grid" in words:
        _write(Path(words[words.index("--grid") + 1]), digest)
    return 0


def _digest(words: list[str]) -> str:
    digest = hashlib.sha256()
    skip = False
    for word in words:
        path = Path(word)
        if skip or word in IGNORED:
            skip = not skip
            continue
        digest.update(word.encode())
        if path.is_file() and "results" not in word.split("-o"):
            digest.update(path.read_bytes())
        elif path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _summary(words: list[str], output: Path) -> None:
    from halftone.columns import NAMES

    rows = [Path(word) for word in words[1:] if word.endswith(".json")]
    lines = [",".join(NAMES)]
    for row in rows:
        values = {
            "model": "scenes-t2i",
            "scenario": row.stem,
            "recipe": "minmax",
            "tier": "demo",
            "execution": "simulated",
        }
        lines.append(",".join(values.get(name, "") for name in NAMES))
    _write(output, "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
