"""Training as techniques share it: its options, one guarded `fit`, and the models and losses of distillation."""
