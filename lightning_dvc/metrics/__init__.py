"""The six metrics of the paper, each a pure function of tensors."""
