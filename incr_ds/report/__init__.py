"""Pages that show what a run or a study did: one self-contained HTML file each."""
