"""What a rank does before torch is imported: it handles requests to stop, and checks the run file."""
