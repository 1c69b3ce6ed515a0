"""The command incr-grow, by its path."""

from incr_ds.cli.grow_checkpoint import main

if __name__ == "__main__":
    main()
