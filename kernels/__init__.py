"""What touches bytes: devices, codecs, kernels, each with a CPU reference."""
