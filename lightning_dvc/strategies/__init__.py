"""Ways of choosing, all behind one small protocol."""
