"""Weight clustering: initial centroids, clustering at once, and the training callback. Imports nothing heavy."""
