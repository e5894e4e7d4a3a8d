"""ditcast: calibrate, export and run diffusion transformers and U-Nets, quantized and cached."""

__version__ = "0.1.0"
