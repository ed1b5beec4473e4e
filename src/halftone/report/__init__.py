"""What a run amounts to: the summary table, and one self-contained page with the images behind it."""
