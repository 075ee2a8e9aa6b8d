"""Keras 2 (tf_keras) and TensorFlow Model Optimization: opening their models, and working with both from Keras 3."""
