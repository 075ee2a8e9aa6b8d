"""Runs and training curves in TensorBoard, MLflow or Weights & Biases."""
