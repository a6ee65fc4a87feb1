"""Who is slow: measurements between the ranks of a group, and a judge that names a rank, link or process."""
