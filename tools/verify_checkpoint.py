"""The command incr-verify, by its path."""

from incr_ds.cli.verify_checkpoint import main

if __name__ == "__main__":
    main()
