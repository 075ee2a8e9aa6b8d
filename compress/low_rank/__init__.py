"""Low rank: kernels of dense layers and convolutions become products of smaller ones."""
