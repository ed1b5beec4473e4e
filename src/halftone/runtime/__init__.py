"""How a quantized denoiser is run: `simulated` in float, or `integer`, on the CPU."""
