"""Runs in an environment of its own, where the package image-reward is installed and halftone is not.

    python image_reward_worker.py REQUEST.json SCORES.json

REQUEST holds {"model": NAME, "pairs": [[PROMPT, IMAGE], ...]}; SCORES gets one number a pair.
"""

import json
import sys
import time


def main() -> None:
    request_file, scores_file = sys.argv[1:]
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    import ImageReward

    model = ImageReward.load(request["model"])
    scores, started, told = [], time.monotonic(), 0.0
    for prompt, image in request["pairs"]:
        scores.append(float(model.score(prompt, image)))
        spent = time.monotonic() - started
        if spent - told > 10:
            told, left = spent, spent / len(scores) * (len(request["pairs"]) - len(scores))
            print(f"{len(scores)}/{len(request['pairs'])} images, about {left:.0f} s left", file=sys.stderr)
    with open(scores_file, "w", encoding="utf-8") as file:
        json.dump(scores, file)


if __name__ == "__main__":
    main()
