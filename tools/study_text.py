"""The command incr-study-text, by its path."""

from incr_ds.cli.study_text import main

if __name__ == "__main__":
    main()
