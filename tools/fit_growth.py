"""The command incr-fit-growth, by its path."""

from incr_ds.cli.fit_growth import main

if __name__ == "__main__":
    main()
