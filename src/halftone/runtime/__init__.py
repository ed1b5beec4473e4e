"""How a quantized denoiser is run: `simulated` in float, by integer codes dequantized once."""
