"""`python -m pisces`, as `torchrun -m pisces` needs it."""

from pisces.cli import main

if __name__ == "__main__":
    main()
