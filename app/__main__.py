"""`python -m fedge`: the command line."""

from fedge.cli import main

if __name__ == "__main__":
    main()
