"""What any trainer needs, one thing a file. Nothing here imports from the root."""
