"""Examples that run: the demo, MNIST, a regression, and an existing project before and after."""
