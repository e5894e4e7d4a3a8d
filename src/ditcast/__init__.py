"""ditcast: calibrate, export and run diffusion transformers, quantized and cached."""

__version__ = "0.1.0"
