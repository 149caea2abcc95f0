"""`std-decode sparsity`: how sparse attention is, and what drafts that rely on it come to."""
