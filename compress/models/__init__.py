"""Keras models: opening files safely, walking layers, what is known of each layer type, statistics."""
