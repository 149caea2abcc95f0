"""``std-decode batch``: a question about many videos, answered into a file that can be resumed."""
