"""Doctor: measurements between the ranks of a group, and a judge that names who is slow."""
