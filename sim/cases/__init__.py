"""Examples as plain data, and the sources they are drawn from."""
