"""Ways of choosing, all behind one protocol."""
