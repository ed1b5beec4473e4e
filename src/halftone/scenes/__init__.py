"""The embedded domain: captions, renderer, prompt splits, and the training of ``scenes-t2i``."""
