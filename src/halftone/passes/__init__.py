"""One file per idea: what is done to a denoiser, in the order of a recipe."""
