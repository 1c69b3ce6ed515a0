"""The command incr-export, by its path."""

from incr_ds.cli.export_huggingface import main

if __name__ == "__main__":
    main()
