"""What a rank does before torch is imported: it heeds requests to stop, and checks what the run file names."""
