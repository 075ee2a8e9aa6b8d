"""Quantization: fewer bits for weights and activations, after training or with training in the loop."""
