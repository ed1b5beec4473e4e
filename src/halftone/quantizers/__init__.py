"""The maths of quantization: no models, no files."""
