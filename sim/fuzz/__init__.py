"""The fuzz loop: implementations under test, what a rank does, shrinking, drawing, files."""
