"""What lets other frameworks use VideoNSA. Each module needs its framework, so nothing else here imports them."""
