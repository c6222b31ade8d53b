"""What the scripts in `examples/` share. Python finds it because it puts a script's own folder on its path."""
