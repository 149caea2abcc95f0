"""`std-decode generate` and `compare`, and what the other commands share with them."""
