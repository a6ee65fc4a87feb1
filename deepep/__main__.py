"""`python -m deepep`: the command line (deepep.cli)."""

from deepep.cli import main

if __name__ == "__main__":
    main()
