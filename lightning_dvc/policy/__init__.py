"""What to draw, how to weigh, what to keep out and what to take back."""
