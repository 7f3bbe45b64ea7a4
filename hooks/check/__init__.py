"""What a set reads and writes, and how good it is: measured over text."""
