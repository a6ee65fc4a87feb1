"""The oracle: what dispatch and combine must give, in plain PyTorch."""
