"""The command incr-prepare-data, by its path."""

from incr_ds.cli.prepare_data import main

if __name__ == "__main__":
    main()
